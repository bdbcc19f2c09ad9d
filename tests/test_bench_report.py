"""Result files: the figures that follow from them, tables, pictures, and what became slower between two of them."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare
from bench.marks import MARKS, reached
from bench.operation_cases import cases
from bench.provenance import write_json
from bench.report import markdown, tables, write_report
from bench.results import best_rival, load_results, rate, ratio

ROOT = Path(__file__).parents[1]


def spread(median: float, again: float = 0.01) -> dict[str, float]:
    return {"median": median, "q20": 0.9 * median, "q80": 1.1 * median, "again": again}


def contestant(name: str, kind: str, median: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "ms": spread(median), "memory_bytes": 2048, **more}


def model_entry(context: int, ratio: float) -> dict[str, Any]:
    measured = {"host_to_device_bytes": 10, "device_to_host_bytes": 0, "logit_error": 1e-6}
    return {
        "id": f"model/tiny/prefill/context={context}",
        "suite": "model",
        **{"model": "tiny", "kind": "prefill", "context": context, "batch": 1, "dtype": "float32", "weights": "random"},
        "contestants": [
            contestant("plain, sdpa", "rival", 2.0, ratio=spread(1.0), **measured),
            contestant("SCX", "scx", 2.0 * ratio, ratio=spread(ratio), **measured),
        ],
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """A result: one operation at 4 ms that moves 1 GB and computes 2 TFLOP, two model cases."""
    size = {"model": "tiny", "tokens": 4096, "redundant": 100, "cached": 0, "batch": 1, "dtype": "float32"}
    operation = {
        **{"id": "operations/permuted_linear/x", "suite": "operations", "operation": "permuted_linear", **size},
        **{"headline": True, "bytes": 10**9, "flops": 2 * 10**12},
        "contestants": [
            contestant("SCX", "scx", 4.0),
            contestant("PyTorch, unfused", "rival", 8.0),
            contestant("product alone", "rival", 5.0),
            {"name": "broken", "kind": "rival", "status": "not available: raised RuntimeError: a | b"},
            contestant("copy of the same bytes", "bound", 1.0),
        ],
    }
    about = {"cuda_device": None, "processor": "A", "threads": 2, "python": "3.11", "packages": {"torch": "2"}}
    return {
        "provenance": {**about, "commit": "abc", "date": "today", "command": "python -m bench", "warnings": ["busy"]},
        "ceilings": {"copy_gb_s": 1000.0, "product_tflop_s": {"float32": 800.0}},
        "left_out": ["no CUDA: much"],
        "cases": [operation, model_entry(8, 1.5), model_entry(512, 1.2)],
    }


def marked(operation: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The fixture's operation as another one at Llama-3-8B's sizes."""
    return {**content["cases"][0], "operation": operation, "model": "Llama-3-8B", "copied_bytes": 10**9, **more}


def test_boundary(content: dict[str, Any]) -> None:
    """Bytes and round trips per block, and how much of the paper's way with the same rows they are."""
    assert "Over the boundary" not in markdown(content)
    for name, size, trips in (("few crossings", 6 * 1024, 5), ("the paper's crossings", 10 * 1024, 8)):
        seen = {"boundary_bytes": size, "round_trips": trips, "blocks": 2}
        content["cases"][1]["contestants"].append(
            contestant(f"SCX, split, {name}", "scx", 2.0, ratio=spread(1.0), logit_error=0.0, **seen)
        )
    text = markdown(content)
    assert "| SCX, split, few crossings | 6 KiB | 3 KiB | 0.600 | 5 | 2.50 |" in text
    assert "| SCX, split, the paper's crossings | 10 KiB | 5 KiB | 1.000 | 8 | 4.00 |" in text


def test_marks(content: dict[str, Any]) -> None:
    """A product of 4 ms beside one of 5 ms alone has 1.25 of its speed. One of few rows, held against a weight of 1 GB
    that a copy would move in 1 ms, has 0.25, and misses; other sizes, other models and rivals of other marks do not
    count."""
    assert not list(reached(content))
    content["cases"] = [
        marked("permuted_linear", content, redundant=128),
        marked("permuted_linear", content, tokens=16, redundant=0),
        marked("permuted_linear", content, redundant=100),
        marked("attention", content),
    ]
    product, few = reached(content)
    assert (product.fraction, product.of_copy, product.is_enough) == (1.25, 0.25, True)
    assert (few.fraction, few.is_enough) == (0.25, False)
    assert "| 0.85 of copy bandwidth on the weight | 0.25 | 0.25 | no |" in markdown(content)


def test_the_mark_of_a_sealed_step(content: dict[str, Any]) -> None:
    """1 GB of cache that a copy moves in 1 ms needs 2 ms of keystream by 20 rounds and 0.5 ms by 8: at 4 ms, a half and
    a quarter of the limit's speed."""
    content["ceilings"]["keystream_gb_s"] = {"20": 500.0, "8": 2000.0}
    size = {"cached": 8192, "tokens": 1, "keystream_bytes": 10**9}
    content["cases"] = [marked("attention_step+sealed", content, **size, rounds=rounds) for rounds in (20, 8)]
    long, short = reached(content)
    assert (long.fraction, long.of_copy, long.is_enough) == (0.5, 0.25, False)
    assert short.fraction == 0.25
    text = markdown(content)
    assert "| attention_step+sealed, 8,192 cached, batch 1, 20 rounds |" in text
    assert "keystream of 20 rounds 500 GB/s; keystream of 8 rounds 2e+03 GB/s" in text


def test_marks_are_measured_on_cuda() -> None:
    """Every mark has its sizes among a GPU's cases; those of the longest ranges reach both ends."""
    sizes = [
        (mark.name, case.tokens + case.redundant, case.cached)
        for mark in MARKS
        for case in cases(on_cuda=True)
        if mark.is_for(dataclasses.asdict(case))
    ]
    assert {name for name, _, _ in sizes} == {mark.name for mark in MARKS}
    few, prefill, step, sealed = (MARKS[index].name for index in (1, 3, 4, 5))
    assert {rows for name, rows, _ in sizes if name == few} == {1, 4, 16, 64}
    assert {rows for name, rows, _ in sizes if name == prefill} == {2048, 4096, 8192, 16384}
    for long_steps in (step, sealed):
        assert {cached for name, _, cached in sizes if name == long_steps} == {8192, 16384, 32768, 65536}


def test_rate_and_ratio(content: dict[str, Any]) -> None:
    """2 TFLOP in 4 ms are 500 TFLOP/s, 62.5 % of a ceiling of 800; the best rival takes 5 ms, and the copy is none."""
    operation = content["cases"][0]
    scx = operation["contestants"][0]
    assert rate(content, operation, scx) == pytest.approx((500.0, "TFLOP/s", 0.625))
    assert best_rival(operation)["name"] == "product alone"
    assert ratio(operation, scx) == pytest.approx(0.8)
    operation["flops"] = 0
    assert rate(content, operation, scx) == pytest.approx((250.0, "GB/s", 0.25))
    content["ceilings"]["keystream_gb_s"] = {"20": 500.0}
    operation |= {"keystream_bytes": 10**9, "rounds": 20}
    assert rate(content, operation, scx) == pytest.approx((250.0, "GB/s", 0.5))
    assert rate(content, operation, operation["contestants"][1]) == pytest.approx((125.0, "GB/s", 0.125))
    assert ratio(content["cases"][1], content["cases"][1]["contestants"][1]) == 1.5


def test_tables(content: dict[str, Any]) -> None:
    short = {table.title: table for table in tables(content)}
    assert short["Operations"].rows[0][2:7] == ("4 ms", "500 TFLOP/s", "62 %", "product alone", "0.80")
    (models,) = (table for title, table in short.items() if title.startswith("tiny"))
    assert [row[-1] for row in models.rows] == ["3.6 (first token, context 8)", "–"]
    assert models.rows[0][2] == "1.500 (1.350–1.650)"
    for table in tables(content, everything=True):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_markdown(content: dict[str, Any]) -> None:
    """Every row has its table's columns, and doubts and gaps are told."""
    text = markdown(content)
    assert "doubtful: busy" in text
    assert "left out: no CUDA: much" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)


def test_pictures(content: dict[str, Any], tmp_path: Path) -> None:
    written = write_report(content, tmp_path / "m.json")
    assert [path.name for path in written] == ["m.md", "m-roofline.png", "m-context.png"]
    assert all(path.stat().st_size > 500 for path in written)
    content["cases"] = []
    assert len(write_report(content, tmp_path / "empty.json")) == 1


def test_slower_beyond_noise(content: dict[str, Any]) -> None:
    """Noise of 1 % lets 2 % pass; a case that is noisier by itself lets more pass."""
    new = copy.deepcopy(content)
    new["cases"][0]["contestants"][0]["ms"] = spread(4.2)
    new["cases"][1]["contestants"][1]["ratio"] = spread(1.5 * 1.015)
    found = compare(content, new)
    assert [(change.case, change.name) for change in found.slower] == [("operations/permuted_linear/x", "SCX")]
    assert found.slower[0].change == pytest.approx(0.05)
    assert not found.faster
    assert [change.case for change in compare(new, content).faster] == ["operations/permuted_linear/x"]
    content["cases"][0]["contestants"][0]["ms"]["again"] = -0.03
    assert not compare(content, new).slower


def test_lost_and_differing(content: dict[str, Any]) -> None:
    new = copy.deepcopy(content)
    new["provenance"]["processor"] = "B"
    new["cases"][0]["contestants"][0]["status"] = "failed: error 1"
    del new["cases"][2]
    found = compare(content, new)
    assert found.lost == ["operations/permuted_linear/x, SCX: failed: error 1"]
    assert "processor differs: A before, B now" in found.remarks
    assert "3 figures are in the old file alone, 0 in the new one alone" in found.remarks


@pytest.mark.parametrize(("time", "status"), [(4.0, 0), (5.0, 1)])
def test_compare_command(content: dict[str, Any], tmp_path: Path, time: float, status: int) -> None:
    old = write_json(tmp_path / "old.json", content)
    content["cases"][0]["contestants"][0]["ms"] = spread(time)
    new = write_json(tmp_path / "new.json", content)
    command = [sys.executable, "-m", "bench.compare", str(old), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    assert ("SCX: +25.0 %" in done.stdout) == bool(status)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"results": []})
    with pytest.raises(ValueError, match="result file"):
        load_results(path)
