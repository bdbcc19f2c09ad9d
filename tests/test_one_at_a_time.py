"""One pass or operation at a time works on a cache, and what is for once is used once: whoever comes in between, in
another thread, a hook, or a fork, is refused by name or has keys of its own."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import difference, tiny_model
from torch import Tensor
from transformers import DynamicCache

import scx_kernels as ops
from scx import SCXKeyGenerator, decode_kvcache, encode_llama, encoded_llama, save_kvcache, split_kvcache_dynamic
from scx.encoding import Noise
from scx.kvcache import EncodedCache, SealedLayer
from scx.kvcache.conversation import Claim
from scx.models.split import restore_conversation

SETTINGS: dict[str, dict[str, Any]] = {
    "permuted": {"redundant_num": 3, "alp": True},
    "sealed": {"redundant_num": 3, "alp": True, "cache_encoding": "sealed"},
}
by_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def in_thread(work: Callable[[], Any]) -> BaseException | None:
    """What `work` raises in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def directly(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except RuntimeError as error:
        return error
    return None


OPERATIONS: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "a pass": lambda model, cache, ids: model(ids, past_key_values=cache),
    "crop": lambda model, cache, ids: cache.crop(-1),
    "reorder": lambda model, cache, ids: cache.reorder_cache(torch.tensor([0], device=ids.device)),
}
WHOLE: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    **OPERATIONS,
    "keep tokens": lambda model, cache, ids: cache.keep_tokens([0, 1]),
    "reset": lambda model, cache, ids: cache.reset(),
    "decode": lambda model, cache, ids: decode_kvcache(cache, cache.session),
    "copy": lambda model, cache, ids: copy.copy(cache),
    "deep copy": lambda model, cache, ids: copy.deepcopy(cache),
    "pickle": lambda model, cache, ids: pickle.dumps(cache),
    "divide": lambda model, cache, ids: split_kvcache_dynamic(cache, gpu_layers=[1]),
    "a pass over another handle": lambda model, cache, ids: model(ids, past_key_values=cache.attached(cache.session)),
}


class TestInBetween:
    @torch.no_grad()
    @by_settings
    def test_a_cache_in_a_pass_is_not_saved(self, llama, prompt, settings, tmp_path) -> None:
        found: list[BaseException | None] = []
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            cache = llama(prompt(9)).past_key_values
            hook = llama.model.layers[1].self_attn.q_proj.register_forward_hook(
                lambda *_: found.append(in_thread(lambda: save_kvcache(tmp_path / "cache", cache, cache.session)))
            )
            llama(prompt(1), past_key_values=cache)
            hook.remove()
            assert "has not ended" in str(found[0])
            assert not list(tmp_path.iterdir())
            assert save_kvcache(tmp_path / "cache", cache, cache.session) == 1

    @torch.no_grad()
    @by_settings
    @pytest.mark.parametrize("run", [in_thread, directly])
    @pytest.mark.parametrize("name", WHOLE)
    def test_a_cache_in_a_pass_is_left_alone(self, llama, prompt, settings, run, name: str) -> None:
        """Refused while a pass runs, which goes on as if nobody had come; afterwards it works."""
        plain = llama(prompt(9)).past_key_values
        expected = llama(prompt(1, seed=3), past_key_values=plain).logits
        found: list[BaseException | None] = []
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            cache = llama(prompt(9)).past_key_values
            hook = llama.model.layers[1].self_attn.q_proj.register_forward_hook(
                lambda *_: found.append(run(lambda: WHOLE[name](llama, cache, prompt(1)))) if not found else None
            )
            logits = llama(prompt(1, seed=3), past_key_values=cache).logits
            hook.remove()
            assert difference(logits, expected) < 1e-4
            assert cache.get_seq_length() == 10
            assert isinstance(found[0], RuntimeError)
            assert "another pass or operation on this cache has not ended" in str(found[0])
            WHOLE[name](llama, cache, prompt(1))

    @torch.no_grad()
    @by_settings
    def test_parts_of_a_cache_are_claimed_together(self, llama, prompt, settings) -> None:
        found: list[BaseException | None] = []
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            parts = split_kvcache_dynamic(llama(prompt(9)).past_key_values, gpu_layers=[1], cpu_device=llama.device)
            again = dict(zip(("gpu_kvcache", "cpu_kvcache"), parts, strict=True))
            hook = llama.model.layers[1].self_attn.q_proj.register_forward_hook(
                lambda *_: found.append(directly(lambda: llama(prompt(1), **again))) if not found else None
            )
            llama(prompt(1), **again)
            hook.remove()
            assert "has not ended" in str(found[0])
            llama(prompt(1), **again)

    @torch.no_grad()
    @by_settings
    @pytest.mark.parametrize("given", [True, False])
    def test_an_empty_cache_is_filled_once(self, llama, prompt, settings, given: bool) -> None:
        """A plain cache that a prefill fills, given or its own, takes no other prompt meanwhile."""
        found: list[BaseException | None] = []
        plain = DynamicCache(config=llama.config) if given else None

        def meanwhile(module, args, kwargs) -> None:
            cache = kwargs["past_key_values"]
            if not found:
                found.append(in_thread(lambda: llama(prompt(4, seed=8), past_key_values=cache)))

        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            hook = llama.model.layers[0].self_attn.register_forward_pre_hook(meanwhile, with_kwargs=True)
            cache = llama(prompt(9), past_key_values=plain).past_key_values
            hook.remove()
            assert "has not ended" in str(found[0])
            assert cache.get_seq_length() == 9

    @torch.no_grad()
    @pytest.mark.parametrize("name", [*OPERATIONS, "restore"])
    def test_a_conversation_of_two_parties(self, llama, prompt, name: str) -> None:
        operations = {**OPERATIONS, "restore": lambda model, cache, ids: restore_conversation(model, cache)}
        found: list[BaseException | None] = []
        expected = llama.generate(prompt(9), max_new_tokens=4, do_sample=False)
        encode_llama(llama, SCXKeyGenerator.for_model(llama, redundant_num=3), llama.device)
        cache = llama(prompt(9)[:, :-1]).past_key_values

        def meanwhile(*_: Any) -> None:
            if not found:
                found.append(in_thread(lambda: operations[name](llama, cache, prompt(1))))

        hook = llama.model.layers[1].mlp.register_forward_hook(meanwhile)
        answer = llama.generate(prompt(9), past_key_values=cache, max_new_tokens=4, do_sample=False)
        hook.remove()
        assert torch.equal(answer, expected)
        assert "has not ended" in str(found[0])
        operations[name](llama, cache, prompt(1))

    @torch.no_grad()
    @by_settings
    def test_a_refused_or_broken_pass_lets_go(self, llama, prompt, settings) -> None:
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            cache = llama(prompt(9)).past_key_values
            with pytest.raises(ValueError, match="holds 1 sequences"):
                llama(prompt(1, 2), past_key_values=cache)
            hook = llama.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama(prompt(1), past_key_values=cache)
            hook.remove()
            llama(prompt(1), past_key_values=cache)
            assert cache.get_seq_length() == 10


class Observer:
    """Sealed rows of a session as they are taken in, by what their keystream depends on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[tuple[Any, ...], Tensor] = {}
        self.again: list[tuple[Any, ...]] = []
        self.lock = threading.Lock()
        original = EncodedCache.take_in

        def take_in(cache: EncodedCache, place: int, slots: Any) -> Any:
            layer, new = cache.layers[place], slice(slots.offset, slots.offset + slots.tokens)
            if isinstance(layer, SealedLayer):
                for kind, states in enumerate((slots.keys, slots.values)):
                    for token, number in enumerate(slots.sealing.writes[0, new].tolist()):
                        name = (cache.session_id, layer.branch, place, kind, number)
                        self.look(name, ops.sealing.patterns(states[:, :, slots.offset + token]).clone())
            return original(cache, place, slots)

        monkeypatch.setattr(EncodedCache, "take_in", take_in)

    def look(self, name: tuple[Any, ...], bits: Tensor) -> None:
        with self.lock:
            if not torch.equal(self.seen.setdefault(name, bits), bits):
                self.again.append(name)


class TestForOnce:
    @torch.no_grad()
    def test_threads_over_one_cache_use_no_keystream_twice(self, llama, prompt, monkeypatch) -> None:
        observer, refused, done = Observer(monkeypatch), [], []
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **SETTINGS["sealed"])):
            cache = llama(prompt(9)).past_key_values

            def go_on(seed: int) -> None:
                for step in range(20):
                    error = directly(lambda s=step: llama(prompt(1, seed=100 * seed + s), past_key_values=cache))
                    (done if error is None else refused).append(error)

            threads = [threading.Thread(target=go_on, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(done) + len(refused) == 80
        assert cache.get_seq_length() == 9 + len(done)
        assert all("has not ended" in str(error) for error in refused)
        assert len(observer.seen) == 3 * 2 * (9 + len(done))
        assert observer.again == []

    @torch.no_grad()
    def test_threads_with_caches_of_one_session(self, llama, prompt, monkeypatch) -> None:
        """Copies go on side by side, each as if it were alone."""
        plain = llama(prompt(9)).past_key_values
        expected = []
        for seed in range(3):
            own = copy.deepcopy(plain)
            expected.append([llama(prompt(1, seed=s), past_key_values=own).logits for s in range(seed, seed + 5)])
        observer = Observer(monkeypatch)
        got: dict[int, list[Tensor]] = {}
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **SETTINGS["sealed"])):
            cache = llama(prompt(9)).past_key_values

            def go_on(seed: int, own: EncodedCache) -> None:
                with torch.no_grad():
                    got[seed] = [llama(prompt(1, seed=s), past_key_values=own).logits for s in range(seed, seed + 5)]

            threads = [threading.Thread(target=go_on, args=(seed, copy.deepcopy(cache))) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert observer.again == []
        for seed in range(3):
            assert all(difference(a, b) < 1e-4 for a, b in zip(got[seed], expected[seed], strict=True))

    @torch.no_grad()
    def test_a_block_that_runs_twice_over_a_sealed_cache_is_refused(self, llama, prompt, monkeypatch) -> None:
        observer = Observer(monkeypatch)
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **SETTINGS["sealed"])):
            cache = llama(prompt(9)).past_key_values
            hook = twice(llama.model.layers[1])
            for request in ({"past_key_values": cache}, {}):
                with pytest.raises(RuntimeError, match="layer 1: its block runs twice in one pass"):
                    llama(prompt(4), **request)
            hook.remove()
            assert cache.get_seq_length() == 9
            llama(prompt(1), past_key_values=cache)
        assert observer.again == []

    @torch.no_grad()
    @by_settings
    @pytest.mark.parametrize("place", [0, 1])
    def test_a_block_that_runs_twice_has_other_keys_each_time(self, llama, prompt, settings, place: int) -> None:
        """The answer is the plain model's; noise, order and redundant rows of the second run are not the first's."""
        hook = twice(llama.model.layers[place])
        expected = llama(prompt(9), use_cache=False).logits
        entered: list[Tensor] = []
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **settings)):
            llama.model.layers[place].mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
            noise = spy_noise(llama)
            got = llama(prompt(9), use_cache=False).logits
        hook.remove()
        assert difference(got, expected) < 1e-4
        first, second = entered
        assert first.shape == second.shape == (1, 12, 96)
        assert not (first[0][:, None] - second[0][None]).abs().amax(-1).lt(1e-6).any()
        assert len(noise) == (2 if place == 0 else 1)
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(noise))

    @torch.no_grad()
    def test_a_fork_in_the_middle_of_a_pass(self, llama, prompt, monkeypatch) -> None:
        """Its child has the pass's numbers and so has its parent: the child is refused, and can begin the pass anew."""
        with encoded_llama(llama, SCXKeyGenerator.for_model(llama, **SETTINGS["sealed"])):
            cache = llama(prompt(9)).past_key_values
            q_proj = llama.model.layers[1].self_attn.q_proj
            hook = q_proj.register_forward_hook(lambda *_: monkeypatch.setattr("os.getpid", lambda: -1))
            with pytest.raises(RuntimeError, match="forked in the middle of a pass"):
                llama(prompt(1), past_key_values=cache)
            hook.remove()
            assert cache.get_seq_length() == 9
            llama(prompt(1), past_key_values=cache)


def twice(block: torch.nn.Module) -> Any:
    """A hook by which a block runs on what it gives."""

    def again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return module.forward(output, *args[1:], **kwargs)

    return block.register_forward_hook(again, with_kwargs=True)


def spy_noise(model: Any) -> list[Tensor]:
    """Every noise that is taken for a first block's input."""
    taken: list[Tensor] = []
    encoding = model.model._scx
    original = encoding.open_session

    def open_session(batch: int) -> Any:
        session = original(batch)
        take = session.take_noise

        def take_noise(*args: Any, **options: Any) -> Noise:
            noise = take(*args, **options)
            taken.append(noise.steps)
            return noise

        session.take_noise = take_noise
        return session

    encoding.open_session = open_session
    return taken


@torch.no_grad()
def test_claims_are_not_copied() -> None:
    """A copy of a plain cache that a pass has claimed is free."""
    cache = tiny_model()(torch.ones(1, 3, dtype=torch.long)).past_key_values
    with Claim.of(cache).held("here"):
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            with Claim.of(twin).held("there"):
                assert twin.get_seq_length() == 3
