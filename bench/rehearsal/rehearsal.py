"""One rehearsal: settings served on the stand-in device, every launch recorded, every fault noted."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.rehearsal.device import StandInDevice
from bench.rehearsal.operators import Operators
from bench.rehearsal.requests import Pair
from bench.rehearsal.settings import Setting
from bench.rehearsal.specialisation import Variant, variant_of
from bench.rehearsal.tensors import Wait, backing_of, package_frames
from scx import SCXKeyGenerator, encoded_llama, warm_up
from scx_kernels.kernels.launch import TARGETS, Target
from scx_kernels.operations import allow_unproven

ALL_TARGETS = tuple(TARGETS["cuda", arch] for arch in (80, 90, 100))
# Inside them nothing may wait for the device: they run while the host queues what comes next.
BLOCKS = ("EncodedDecoderLayer.forward", "EncodedAttention.forward", "UntrustedParty.")


@dataclass(frozen=True)
class Failure:
    """What went wrong, in which request and where."""

    request: str
    what: str

    def __str__(self) -> str:
        return f"{self.request}: {self.what}"


@dataclass
class Rehearsal:
    """What was asked for so far.

    Attributes:
        targets: whose tiles are chosen.
        requests, launches: how many.
        variants: what the JIT would compile, and who first asked for it where.
        failures: in the order in which they were met.
    """

    targets: tuple[Target, ...] = ALL_TARGETS
    requests: int = 0
    launches: int = 0
    variants: dict[Variant, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    _request: str = ""
    _asked: dict[Variant, str] = field(default_factory=dict)  # by the setting that is served

    def serve(
        self,
        setting: Setting,
        requests: dict[str, Callable[[Pair], None]],
        *,
        has_values: bool = True,
        warms_up: bool = True,
        may_wait: bool = False,
    ) -> None:
        """Run requests on a model, and hold what they ask for against what `scx.warm_up` did.

        Args:
            has_values: False: shapes alone, of a model that is as large as it likes.
            warms_up: compare with the warm-up.
            may_wait: part of a cache lies on the CPU, so blocks wait for the device.
        """
        torch.manual_seed(0)
        plain = setting.model() if has_values else None
        self._asked = {}
        with self._served(setting, plain) as (device, model):
            pair = Pair(model, plain)
            for name, request in requests.items():
                device.waits.clear()
                self._attempt(f"{setting.name}, {name}", lambda request=request: request(pair))
                if not may_wait:
                    self._check_waits(device.waits)
        if warms_up:
            self._check_warm_up(setting)

    def compute(self, requests: dict[str, Callable[[], None]]) -> None:
        """Run what needs no model; none of it may wait for the device but to read results."""
        device = StandInDevice(Operators(self.targets, self._record))
        with torch.no_grad(), allow_unproven(), device:
            for name, request in requests.items():
                torch.manual_seed(0)
                device.waits.clear()
                self._attempt(name, request)
                for wait in device.waits:
                    if wait.frames:  # not of what reads results
                        file, line, function = wait.frames[-1]
                        what = f"the host waits for the device: {wait.operation} at {file}:{line} in {function}"
                        self.failures.append(Failure(name, what))

    def _check_warm_up(self, setting: Setting) -> None:
        """What the requests asked for, the warm-up of such a model must have asked for."""
        asked, self._asked = self._asked, {}
        # Shapes alone: a padded mask is read as one that hides something, which is all that depends on values.
        with self._served(setting, None) as (_, model):
            self._attempt(f"{setting.name}, warm-up", lambda: warm_up(model))
        for variant, where in asked.items():  # told at most once a variant, by the first request that met it
            if variant not in self._asked:
                what = f"not warmed up: sm_{variant.target.arch} {variant.describe()}"
                self.failures.append(Failure(where, what))

    @contextmanager
    def _served(self, setting: Setting, plain: Any | None) -> Iterator[tuple[StandInDevice, Any]]:
        """The device, and the encoded model on it: with the plain model's weights, or without values."""
        options = dict(setting.placement)
        secure = options.pop("secure_device", None)
        # What was wrong on a GPU once, and is refused there, has to be ready for when it is understood.
        device = StandInDevice(Operators(self.targets, self._record), has_values=plain is not None)
        with torch.no_grad(), allow_unproven(), device:
            with torch.device("cuda"):
                model = setting.model()
            if plain is not None:
                for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
                    backing_of(mine).copy_(its)
            with encoded_llama(model, SCXKeyGenerator.for_model(model, **setting.keys), secure, **options):
                yield device, model

    def _attempt(self, name: str, request: Callable[[], None]) -> None:
        self._request = name
        self.requests += 1
        try:
            request()
        except Exception as error:  # whatever it is, it is a finding, and the next request is made
            self.failures.append(Failure(name, _described(error)))

    def _check_waits(self, waits: Iterable[Wait]) -> None:
        met: dict[tuple[Any, ...], Wait] = {}
        for wait in waits:
            if wait.is_ours and any(name.startswith(BLOCKS) for _, _, name in wait.frames):
                met.setdefault((wait.operation, wait.frames[-1]), wait)
        for wait in met.values():
            file, line, name = wait.frames[-1]
            what = f"the host waits for the device inside the blocks: {wait.operation} at {file}:{line} in {name}"
            self.failures.append(Failure(self._request, what))

    def _record(self, target: Target, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        self.launches += 1
        variant = variant_of(kernel, args, meta, target)
        if variant not in self._asked:
            self._asked[variant] = self._place()
        self.variants.setdefault(variant, self._asked[variant])

    def _place(self) -> str:
        frames = package_frames()
        outside = [frame for frame in frames if not frame[0].startswith("scx_kernels")]
        parts = [f"{file}:{line}" for file, line, _ in (*outside[-1:], *frames[-2:-1])]
        return f"{self._request}, {' by '.join(parts)}"


def _described(error: BaseException) -> str:
    """The error, and the package's line that met it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [x for x in frames if "/scx/" in x.filename or "/scx_kernels/" in x.filename]
    last = (inside or frames)[-1]
    place = "/".join(Path(last.filename).parts[-3:])
    return f"{type(error).__name__}: {str(error).strip()[:600]} ({place}:{last.lineno} in {last.name})"
