"""Sphinx: the repository's pages, docs/ beside README, SECURITY.md and the notes, and docstrings. Nothing is fetched.

The source is the repository's root, so that a link between pages is one and the same here and where the repository is
read, and a link to nothing is an error.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "SCX"
author = "the SCX authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "bench/NOTES.md", "bench/results/*.md", "bench/results/**/*.md"]
exclude_patterns = ["docs/_build", ".venv*", ".*", "**/__pycache__", "*.egg-info"]

html_theme = "furo"
html_title = "SCX"
html_extra_path = ["html"]
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the tables that `python -m bench` writes begin at the third level

# In docstrings, `x` is code. Types in signatures are named as they are: others' pages would have to be fetched, and
# what users do not make themselves is not described here.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
nitpick_ignore_regex = [("py:class", r".*")]  # of signatures


SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Source):( (?P<text>.+))?$")
FIELD = re.compile(r" {4}(?P<names>\w+(, \w+)*): (?P<text>.+)$")
MARKS = re.compile(r"(`[^`]*`)|([*|_\\])")


def _escaped(line: str) -> str:
    """Signs that mean something in reST and nothing in our docstrings, outside of code."""
    return MARKS.sub(lambda found: found[1] or "\\" + found[2], line)


def _restructured(lines: list[str]) -> list[str]:
    """A docstring of this package in reST: sections begin with a word and a colon, in their line or below it."""
    out: list[str] = []
    section = None
    for line in lines:
        if found := SECTION.match(line):
            section = "text" if found["text"] else "fields"
            out += ["", f":{found[1]}: {_escaped(found['text'] or '')}".rstrip()]
        elif section == "fields" and (field := FIELD.match(line)):
            names = ", ".join(f"`{name}`" for name in field["names"].split(", "))
            out += ["", f"    {names}", f"        {_escaped(field['text'])}"]
        elif section == "text" and line:
            out.append("    " + _escaped(line.lstrip()))
        else:
            stays = section == "fields" and (not line or line.startswith(" "))
            section = section if stays else None
            out.append(_escaped(line))
    return out


def setup(app: Sphinx) -> None:
    def convert(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        lines[:] = _restructured(lines)

    app.connect("autodoc-process-docstring", convert)
