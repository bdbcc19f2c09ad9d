"""The dashboard is one that Grafana imports, and asks for metrics that there are, by labels that they have."""

import itertools
import re
from pathlib import Path

from scx.vllm.counters import COUNTERS
from tests.dashboard import DASHBOARD, VLLMS_METRICS, names_in

OURS = {f"{name}_total": labels for name, (_, labels) in COUNTERS.items()}
PANELS = DASHBOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def test_its_form() -> None:
    """https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/"""
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])
    assert {x["name"]: x["type"] for x in DASHBOARD["templating"]["list"]} == {
        "datasource": "datasource",
        "job": "query",
    }
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_no_panel_lies_on_another() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for a, b in itertools.combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_every_metric_is_one() -> None:
    for title, query in QUERIES:
        assert names_in(query), title
        assert names_in(query) <= set(OURS) | VLLMS_METRICS, title
        assert query.count("(") == query.count(")"), title
        assert query.count('{job=~"$job"}') == len(re.findall(r"[a-z]+:", query)), title


def test_every_counter_of_ours_is_shown() -> None:
    assert set().union(*(names_in(query) for _, query in QUERIES)) >= set(OURS)


def test_ours_are_split_by_labels_that_they_have() -> None:
    for title, query in QUERIES:
        for by in re.findall(r"by \((\w+)\)", query):
            for name in names_in(query) & set(OURS):
                assert by in OURS[name], title


def test_the_operators_page_lists_every_counter() -> None:
    page = (Path(__file__).parents[1] / "docs" / "vllm.md").read_text()
    listed = dict(re.findall(r"\| `(scx:\w+)` \|[^|]+\|([^|]*)\|", page))
    assert {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in listed.items()} == OURS
