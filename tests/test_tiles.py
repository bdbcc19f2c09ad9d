"""Tiles: measured ones are taken where they fit, and the tuning command keeps only what is right and faster."""

import json
from pathlib import Path

import pytest
import torch
from parity import permutations, randn

from scx_kernels import subjects, tiles
from scx_kernels import tune as tuner
from scx_kernels.kernels import launch, rows
from scx_kernels.kernels.launch import TARGETS, Target
from scx_kernels.tune import SUBJECTS, Subject, candidates, main, tune

TILE = {"BLOCK_M": 2, "BLOCK_D": 64, "num_warps": 1}
ENTRY = {
    "operation": "inject_permute",
    "dtype": "float32",
    "variant": "",
    "sizes": {"rows": 16, "features": 64},
    "tile": TILE,
}


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SCX_TILES", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(directory) -> str:
    tiles.TileFile("A Device 9", {"date": "today"}, (ENTRY,)).write(directory)
    return "A Device 9"


def found(device: str, dtype=torch.float32, variant: str = "", **sizes: int):
    return tiles.nearest(device, "inject_permute", dtype, variant, sizes)


def test_the_nearest_shape_gives_its_tile(measured) -> None:
    assert found(measured, rows=16, features=64) == TILE
    assert found(measured, rows=30, features=64) == TILE
    assert found(measured, rows=40, features=64) == {}, "more than twice as many rows"
    assert found(measured, rows=16, features=96) == {}, "a row wider than the tile"
    assert found(measured, torch.float16, rows=16, features=64) == {}
    assert found(measured, variant="norm", rows=16, features=64) == {}
    assert found("Another", rows=16, features=64) == {}
    assert found("", rows=16, features=64) == {}


def test_a_launcher_takes_it(measured, monkeypatch) -> None:
    """The kernel runs with the measured tile, and an override of the caller's stands above it."""
    used = []
    monkeypatch.setattr(launch, "TARGETS", {("cuda", 90): Target("cuda", 90, 132, 232_448, measured)})
    monkeypatch.setattr(launch, "_device_target", lambda index: launch.TARGETS["cuda", 90])
    monkeypatch.setattr(rows, "launch", lambda kernel, grid, *args, device, **meta: used.append(meta))
    x, index = randn(1, 16, 64), permutations(1, 16)
    rows.inject_permute(x, index)
    rows.inject_permute(x, index, tile={"BLOCK_M": 4})
    rows.inject_permute(randn(1, 160, 64), permutations(1, 160))
    assert used[0].items() >= TILE.items()
    assert used[1]["BLOCK_M"] == 4
    assert used[2]["BLOCK_M"] != 2


@pytest.mark.parametrize("content", ["{", '{"device": "A Device 9"}'])
def test_a_broken_file_is_said(directory, content: str) -> None:
    (directory / "a-device-9.json").write_text(content)
    tiles.load.cache_clear()
    tiles._nearest.cache_clear()
    with pytest.raises((ValueError, KeyError)):
        found("A Device 9", rows=16, features=64)


def test_shipped_files_are_readable() -> None:
    for path in tiles.SHIPPED.glob("*.json"):
        assert tiles.load(json.loads(path.read_text())["device"], (tiles.SHIPPED,)) is not None


def subject(wrong: dict | None = None) -> Subject:
    """A product of two sizes of tile; `wrong` is one that gives a wrong result."""

    def run(arguments, tile):
        return arguments["x"] + (1 if tile == wrong else 0)

    return Subject(
        "permuted_linear", {"rows": 4}, lambda device: {"x": torch.ones(4)}, run, lambda arguments: arguments["x"],
        lambda target: {"BLOCK_N": 32, "num_warps": 4}, {"BLOCK_N": (32, 64), "num_warps": (4, 8)},
    )  # fmt: skip


def clock(*milliseconds: float):
    left = iter(milliseconds)
    return lambda call: next(left)


def test_tuning_keeps_the_fastest_right_tile() -> None:
    tile = TARGETS["cuda", 90]
    tried = candidates(subject(), tile)
    assert len(tried) == 4
    assert tried[0] == {"BLOCK_N": 32, "num_warps": 4}
    entry = tune(subject(), torch.device("cpu"), tile, clock(1.0, 0.9, 0.5, 0.8))
    assert entry is not None
    assert entry["tile"] == tried[2]
    assert entry["milliseconds"] == 0.5
    assert tune(subject(), torch.device("cpu"), tile, clock(1.0, 0.99, 0.98, 1.2)) is None, "within the noise"
    entry = tune(subject(wrong=tried[2]), torch.device("cpu"), tile, clock(1.0, 0.9, 0.8))
    assert entry is not None
    assert entry["tile"] == tried[3], "a wrong tile is not timed"
    with pytest.raises(RuntimeError, match="the heuristic's tile"):
        tune(subject(wrong=tried[0]), torch.device("cpu"), tile, clock())


NARROW = subjects.MODELS[-1]
SMALL = (
    subjects._product(NARROW, 1),
    *(subjects._injection(NARROW, 9, norm) for norm in (False, True)),
    subjects._heads(NARROW, 9),
    *(subjects._transcoding(NARROW, 9, rounds) for rounds in (0, 8)),
    subjects._prefill(NARROW, 9),
    *(subjects._step(NARROW, 1, 40, rounds) for rounds in (0, 8)),
)


def test_every_kind_of_subject_has_a_small_one() -> None:
    assert {(s.operation, s.variant) for s in SMALL} == {(s.operation, s.variant) for s in SUBJECTS}


@pytest.mark.parametrize("smallest", SMALL, ids=lambda subject: subject.name)
def test_every_kind_of_subject_runs(smallest: Subject) -> None:
    """It gives the reference's result with the heuristic's tile, and its sizes are the launcher's."""
    asked = []

    def nearest(device, name, dtype, variant, sizes):
        asked.append((name, variant, dict(sizes)))
        return {}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = smallest.make(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "nearest", nearest)
        got = smallest.run(arguments, None)
    assert (smallest.operation, smallest.variant, smallest.sizes) in asked
    expected = [x.float() for x in subjects.tensors_of(smallest.expected(arguments))]
    assert not tuner._differs(got, expected)
    assert tuner._differs(tuple(x * 1.1 for x in subjects.tensors_of(got)), expected)
    assert smallest.is_stored(arguments, got)
    if "keys" in arguments:
        arguments["keys"].view(torch.int16)[0, 0, -1, -1] ^= 1
        assert not smallest.is_stored(arguments, got), "one bit that is not sealed as it should be"


@pytest.mark.slow
def test_other_processes_compile_ahead() -> None:
    """Each a share of the candidates."""
    (few,) = (s for s in SUBJECTS if s.name == "inject_permute heads rows=64 features=64")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tuner.compiled_ahead([few], device, 2) as compiling:
        assert [share.result(timeout=120) for share in compiling[few.name]] == [None, None]
    with tuner.compiled_ahead([few], device, 1) as compiling:
        assert not compiling


def test_command_without_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "No GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--only", "nothing of the kind"])
