"""The secure side without the blocks' weights: what is loaded, what is refused, and the plain model's tokens."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from scx import (
    SCXKeyGenerator,
    decode_llama,
    encode_llama,
    encoded_llama,
    load_secure_model,
    record_transcript,
    restore_conversation,
)
from scx.__main__ import main
from scx.calibration import CALIBRATION_TOKENS
from scx.encoding import RedundantScale
from scx.models.llama import model_shape
from scx.party import PartyLostError, UntrustedParty
from scx.party.boundary import Request, Rule
from scx.party.loading import weight_bytes
from scx.party.process import RemoteParty
from scx.party.secure import split_plan
from scx.party.transcript import expected_bytes

LAYERS = 4
ALL = {"redundant_num": 3, "alp": True}
by_family = pytest.mark.parametrize("family", FAMILIES)
by_head = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])

Saved = tuple[PreTrainedModel, Path]


def plain_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """Biases, norms per head and sliding windows count: none of them is what a fresh model would have."""
    if family != "llama":
        options |= {"sliding_window": 5}
    if family.startswith("qwen"):
        options |= {"use_sliding_window": True, "max_window_layers": 2}
    model = tiny_model(family, layers=LAYERS, **options).cpu()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if parameter.mean() > 0.5 else 0.0, 0.2)
    return model


@pytest.fixture
def save(tmp_path) -> Callable[..., Saved]:
    def save_model(family: str = "llama", max_shard_size: str = "5GB", **options: Any) -> Saved:
        model = plain_model(family, **options)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        return model, tmp_path

    return save_model


def keys_for(model: PreTrainedModel, **options: Any) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_config(model.config, **{**ALL, **options})


def stand_in(model: PreTrainedModel, keys: SCXKeyGenerator, crossings: str = "few") -> UntrustedParty:
    """The far end of a boundary, in this process: it has the weights of `model`, which the secure side has not."""
    plan = split_plan(keys, model_shape(model), crossings, False)
    return UntrustedParty(model.model.layers, copy.deepcopy(model.model.rotary_emb), plan)


# What is loaded


@by_head
@by_family
@pytest.mark.parametrize(
    ("options", "noisy", "protected"),
    [({}, [0], [0, 3]), ({"alp": False}, [], [0, 3]), ({"protected_layers": 2}, [0, 1], [0, 1, 2, 3])],
    ids=["noise", "no noise", "two blocks"],
)
def test_only_the_secure_sides_weights_are_loaded(
    save, family: str, tied: bool, options: dict, noisy: list[int], protected: list[int]
) -> None:
    """Embedding, norm, head, attention norms, norms of heads, output projections of protected blocks, and q, k, v of
    start blocks under noise are the plain model's; all else has no data, whatever the settings."""
    plain, path = save(family, tie_word_embeddings=tied)
    model = load_secure_model(path, keys_for(plain, **options))
    inside = [f"{block}.input_layernorm.weight" for block in range(LAYERS)]
    if family == "qwen3":
        inside += [f"{block}.self_attn.{x}_norm.weight" for block in range(LAYERS) for x in "qk"]
    inside += [f"{block}.self_attn.o_proj.weight" for block in protected]
    inside += [f"{block}.self_attn.{x}_proj.weight" for block in noisy for x in "qkv"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.{name}" for name in inside}

    known = dict(plain.named_parameters(remove_duplicate=False))
    loaded = dict(model.named_parameters(remove_duplicate=False))
    assert type(model) is type(plain)
    assert loaded.keys() == known.keys()
    assert {name for name, x in loaded.items() if not x.is_meta} == expected
    assert all(torch.equal(loaded[name], known[name]) for name in expected)
    assert all(x.shape == known[name].shape for name, x in loaded.items())
    assert (loaded["lm_head.weight"] is loaded["model.embed_tokens.weight"]) == tied
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert not model.training

    size = weight_bytes(model)
    assert size.whole == sum(x.nbytes for x in plain.parameters())
    rows = 8 * 96 * 4  # of the first block's q_proj, for the fingerprint
    assert size.held == rows + sum(known[name].nbytes for name in expected - ({"lm_head.weight"} if tied else set()))
    assert size.held < size.whole / 2


@by_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_is_the_whole_models(save, family: str, dtype: torch.dtype) -> None:
    """Sizes, unit of the noise and fingerprint are those that a worker reads from the same files in the same dtype,
    also where of the first block's q_proj no more than the covered rows were loaded."""
    plain, path = save(family)
    model = load_secure_model(path, keys_for(plain, alp=False), dtype=dtype)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert model_shape(model) == model_shape(type(plain).from_pretrained(path, dtype=dtype))
    assert model_shape(model).fingerprint != model_shape(tiny_model(family, layers=LAYERS)).fingerprint


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files that Linux gives")
def test_no_file_stays_mapped(save) -> None:
    """Weights are copies: a view of the file would keep all of it within the secure process's reach."""
    plain, path = save()
    model = load_secure_model(path, keys_for(plain))
    assert str(path) not in Path("/proc/self/maps").read_text()
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        view = opened.get_slice("lm_head.weight")[:]
    assert str(path) in Path("/proc/self/maps").read_text(), "the search finds what is mapped"
    assert torch.equal(model.lm_head.weight, view)


def test_sharded_checkpoint(save) -> None:
    """Of several files only those are needed in which the secure side's weights lie."""
    plain, path = save(max_shard_size="100KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    keys = keys_for(plain)
    model = load_secure_model(path, keys)
    here = {name for name, x in model.named_parameters() if not x.is_meta}
    unused = set(index.values()) - {index[name] for name in here}
    assert len(unused) >= 3
    for file in unused:
        (path / file).unlink()
    again = load_secure_model(path, keys)
    assert {name for name, x in again.named_parameters() if not x.is_meta} == here
    assert all(torch.equal(again.get_parameter(name), plain.get_parameter(name)) for name in here)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_head_is_stored_once_under_either_name(save, stored: str) -> None:
    plain, path = save(tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = load_secure_model(path, keys_for(plain))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_generation_settings_come_along(save) -> None:
    plain, path = save()
    GenerationConfig(eos_token_id=7, do_sample=True, top_k=3).save_pretrained(path)
    settings = load_secure_model(path, keys_for(plain)).generation_config
    assert (settings.eos_token_id, settings.do_sample, settings.top_k) == (7, True, 3)


# What is refused


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict], object], str]] = {
    "no norm": (lambda x: x.pop("model.norm.weight"), r"has no tensors \['model.norm.weight'\]"),
    "no head": (lambda x: x.pop("lm_head.weight"), r"has no tensors \['lm_head.weight'\]"),
    "no o_proj": (lambda x: x.pop(O_PROJ), f"has no tensor {O_PROJ}"),
    "no q_proj": (
        lambda x: x.pop("model.layers.0.self_attn.q_proj.weight"),
        "has no tensor model.layers.0.self_attn.q_proj.weight",
    ),
    "wide o_proj": (
        lambda x: x.update({O_PROJ: torch.zeros(96, 97)}),
        rf"{O_PROJ} in .* is \(96, 97\) of F32, expected \(96, 96\) of F32 or F16 or BF16",
    ),
    "quantised o_proj": (
        lambda x: x.update({O_PROJ: torch.zeros(96, 96, dtype=torch.int8)}),
        rf"{O_PROJ} in .* is \(96, 96\) of I8, expected \(96, 96\) of F32 or F16 or BF16",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_wrong_tensors_are_refused(save, kind: str) -> None:
    """By the tensor's name, with what was found and what was expected."""
    plain, path = save()
    change, message = BAD_TENSORS[kind]
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        load_secure_model(path, keys_for(plain, alp=False))


def test_weights_of_the_untrusted_side_are_not_looked_at(save) -> None:
    """A checkpoint from which they were taken is as good."""
    plain, path = save()
    others = [f"model.layers.{block}.mlp.{x}_proj.weight" for block in range(LAYERS) for x in ("gate", "up", "down")]
    rewrite(path, lambda tensors: [tensors.pop(name) for name in others])
    assert model_shape(load_secure_model(path, keys_for(plain))) == model_shape(plain)


def test_other_checkpoints_are_refused(save) -> None:
    """Not safetensors, not a whole one, or an index that leads elsewhere."""
    plain, path = save()
    keys, whole = keys_for(plain), path / "model.safetensors"
    data = whole.read_bytes()
    whole.write_bytes(data[:5000])
    with pytest.raises(ValueError, match="path: .*model.safetensors is no safetensors file"):
        load_secure_model(path, keys)
    whole.unlink()
    torch.save(plain.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"path: .* is no safetensors checkpoint: expected model.safetensors or model"):
        load_secure_model(path, keys)
    index = path / "model.safetensors.index.json"
    for content, message in (
        ("{}", "is no index of a checkpoint: KeyError"),
        ("[", "is no index of a checkpoint"),
        (
            json.dumps({"weight_map": {"lm_head.weight": "../other"}}),
            "expects lm_head.weight in '../other', which is no",
        ),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_secure_model(path, keys)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(plain.state_dict(), "model-00001-of-00001.safetensors")}))
    with pytest.raises(OSError, match="model-00001-of-00001.safetensors"):
        load_secure_model(path, keys)


def test_other_models_and_settings_are_refused(save, tmp_path_factory) -> None:
    plain, path = save()
    keys = keys_for(plain)
    with pytest.raises(ValueError, match="dtype: expected one of .* got torch.int8"):
        load_secure_model(path, keys, dtype=torch.int8)
    with pytest.raises(TypeError, match="key_generator: expected an SCXKeyGenerator, got dict"):
        load_secure_model(path, {})
    with pytest.raises(ValueError, match="hidden_dim: the model's is 96, the key generator's 64"):
        load_secure_model(path, SCXKeyGenerator(10, 64, 16))
    with pytest.raises(ValueError, match="alp=True needs the first layer"):
        load_secure_model(path, keys_for(plain, protected_layers=0))
    other = tmp_path_factory.mktemp("other")
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(other)
    with pytest.raises(TypeError, match="path: expected a model of LlamaModel, .*, got GPT2Model"):
        load_secure_model(other, keys)
    plain.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    plain.config.save_pretrained(path)
    with pytest.raises(TypeError, match="path: .* is quantised"):
        load_secure_model(path, keys)


def test_blocks_must_be_somewhere(save) -> None:
    """Without an untrusted party in another process, or with settings that need more than was loaded, encoding is
    refused by the first weight that is not here, and changes nothing."""
    plain, path = save()
    keys = keys_for(plain)
    model = load_secure_model(path, keys)
    remote, two = {"untrusted": stand_in(plain, keys)}, keys_for(plain, protected_layers=2)
    for device, more, generator, missing in (
        (None, {}, keys, "layers.0.mlp.gate_proj.weight"),
        (None, remote, keys, "layers.0.mlp.gate_proj.weight"),
        ("cpu", {}, keys, "layers.0.mlp.gate_proj.weight"),
        ("cpu", remote, two, "layers.1.self_attn.o_proj.weight"),
    ):
        with pytest.raises(TypeError, match=rf"model: {missing} has no data \(it is on the meta device\)"):
            encode_llama(model, generator, device, **more)
        assert type(model.model) is type(plain.model)
    quiet = load_secure_model(path, keys_for(plain, alp=False))
    with pytest.raises(TypeError, match=r"model: layers.0.self_attn.q_proj.weight has no data"):
        encode_llama(quiet, keys, "cpu", untrusted=stand_in(plain, keys))
    with pytest.raises(TypeError, match=r"model: embed_tokens has no data"):
        model_shape(tiny_model().to("meta"))


# Equality with the plain model


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tied", "crossings"),
    [(family, tied, "few") for family in FAMILIES for tied in (False, True)] + [("qwen3", False, "paper")],
)
def test_tokens_are_the_plain_models(save, prompt, family: str, tied: bool, crossings: str) -> None:
    """A padded batch, with redundant rows and noise; the secure side has only its part."""
    plain, path = save(family, tie_word_embeddings=tied)
    keys = keys_for(plain)
    model = load_secure_model(path, keys)
    ids, mask = prompt(9, 2).cpu(), torch.ones(2, 9, dtype=torch.int64)
    ids[1, :2], mask[1, :2] = 0, 0
    request = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected, logits = plain.generate(**request), plain(ids, attention_mask=mask).logits
    with encoded_llama(model, keys, "cpu", crossings=crossings, untrusted=stand_in(plain, keys, crossings)):
        assert torch.equal(model.generate(**request), expected)
        difference = model(ids, attention_mask=mask).logits - logits
    assert difference[mask.bool()].abs().max() <= 2e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(save, prompt, dtype: torch.dtype) -> None:
    """Logits differ from the plain model's by a few roundings, as in the other placements."""
    plain, path = save()
    plain = type(plain).from_pretrained(path, dtype=dtype)
    keys, ids = keys_for(plain), prompt(9, 2).cpu()
    model = load_secure_model(path, keys, dtype=dtype)
    logits = plain(ids).logits
    encode_llama(model, keys, "cpu", untrusted=stand_in(plain, keys))
    allowed = 24 * torch.finfo(dtype).eps * logits.abs().max()
    assert (model(ids).logits - logits).abs().max() <= allowed


@torch.no_grad()
def test_decoding_leaves_the_secure_part(save, prompt) -> None:
    """As it was before: no parameter was moved off the meta device or onto it, and it can be encoded again."""
    plain, path = save()
    keys, ids = keys_for(plain), prompt(6).cpu()
    model = load_secure_model(path, keys)
    before = {name: (x, x.is_meta) for name, x in model.named_parameters()}
    encode_llama(model, keys, "cpu", untrusted=stand_in(plain, keys))
    decode_llama(model)
    assert type(model.model) is type(plain.model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is x and x.is_meta == was_meta for name, (x, was_meta) in before.items())
    with pytest.raises(RuntimeError, match="meta"):
        model(ids)
    with encoded_llama(model, keys, "cpu", untrusted=stand_in(plain, keys)):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_processes(save, prompt, tmp_path) -> None:
    """The secure process has its part, the worker the whole model: the plain model's tokens, and the scale of redundant
    rows from over there."""
    plain, path = save("qwen3", max_shard_size="300KB")
    keys, ids = keys_for(plain), prompt(9).cpu()
    expected = plain.generate(ids, max_new_tokens=8, do_sample=False)
    model = load_secure_model(path, keys)
    shape = model_shape(model)
    remote = RemoteParty(split_plan(keys, shape, "few", False), shape.fingerprint, timeout=120)
    credentials = tmp_path / "worker.pem"
    remote.save_worker_credentials(credentials)
    told = ["--connect", remote.address, "--credentials", str(credentials), "--model", str(path)]
    command = [sys.executable, "-m", "scx.party.worker", *told]
    worker = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        with encoded_llama(model, keys, "cpu", untrusted=remote), record_transcript(model) as transcript:
            remote.connect()
            made = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(made, expected)
        assert transcript.requests["calibration"] == 1
        remote.close()
        assert worker.wait(timeout=60) == 0
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_demo(save, capsys) -> None:
    """The command answers with the plain model's tokens over two processes, and says what crossed and what is held."""
    plain, path = save(tie_word_embeddings=True)
    words = {word: number for number, word in enumerate(["<unk>", "a", "light", "flashes"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    assert main(["demo-split", "--model", str(path), "--prompt", "a light flashes", "--tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "tokens equal: yes" in shown
    assert re.search(r"^calibration: [\d,]{5,} bytes in 1 round trips$", shown, re.MULTILINE)
    whole = sum(x.nbytes for x in plain.parameters())
    assert re.search(rf"the secure process holds [\d,]+ of {whole:,} bytes of weights", shown)


# The scale of redundant rows


@torch.no_grad()
@by_family
def test_calibration_over_the_boundary_is_the_local_one(save, prompt, family: str) -> None:
    """The blocks' own party measures on the same tokens what the whole model would, to rounding: only the way through
    attention differs."""
    plain, path = save(family)
    keys, ids = keys_for(plain), prompt(5).cpu()
    with encoded_llama(plain, keys, "cpu"):
        local = plain.model._scx.party.scale
    model = load_secure_model(path, keys)
    encode_llama(model, keys, "cpu", untrusted=stand_in(plain, keys))
    assert model.model._scx.party.scale is None
    model(ids)
    remote = model.model._scx.party.scale
    for name in (x.name for x in fields(RedundantScale)):
        mine, theirs = getattr(local, name), getattr(remote, name)
        assert mine.min() > 0
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_calibration_happens_once_and_follows_no_prompt(save, prompt) -> None:
    """Before the first prefill, and not before later ones; it sends the same rows whatever the prompt, as many bytes as
    the formula says. A secure side that has the blocks, or draws no redundant rows, sends none."""
    plain, path = save()
    keys = keys_for(plain, master_key=bytes(range(32)))
    sent = []
    for seed in range(2):
        model = load_secure_model(path, keys)
        encode_llama(model, keys, "cpu", untrusted=stand_in(plain, keys))
        with record_transcript(model) as transcript:
            model(prompt(6, seed=seed).cpu())
            model(prompt(7, 2, seed=seed).cpu())
        assert transcript.requests["calibration"] == 1
        assert [x.stage for x in transcript.crossings[:4]] == ["calibration"] * 4
        plan, shape = split_plan(keys, model_shape(plain), "few", False), model_shape(plain)
        expected = expected_bytes(plan, shape, "calibration", batch=1, tokens=CALIBRATION_TOKENS, redundant=3)
        assert transcript.nbytes("calibration", "to untrusted") == expected.to_untrusted
        assert transcript.nbytes("calibration", "to secure") == expected.to_secure
        sent.append(transcript.select(name="embeddings")[0].tensor)
        rows = plain.get_input_embeddings().weight
        assert (torch.cdist(sent[-1][0], rows).min(dim=1).values < 1e-3).all(), "they are embeddings of tokens"
    assert torch.equal(*sent)

    quiet = keys_for(plain, redundant_num=0)
    for model, generator in ((load_secure_model(path, quiet), quiet), (copy.deepcopy(plain), keys)):
        encode_llama(model, generator, "cpu", untrusted=stand_in(plain, generator))
        with record_transcript(model) as transcript:
            model(prompt(6).cpu())
        assert transcript.requests["calibration"] == 0


class Lying:
    """An untrusted party whose first answers to some requests are changed."""

    def __init__(self, party: UntrustedParty, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
        self.party, self.change, self.plan = party, change, party.plan
        self.is_honest = False

    def begin(self, request: Request, rule: Rule) -> Callable[[], Mapping[str, Tensor]]:
        reply = self.party.receive(request)
        if request.operation == "calibrate" and not self.is_honest:
            reply = self.change(dict(reply))
        return lambda: reply


def replaced(x: Tensor) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    return lambda reply: {**reply, "output_scale": x}


BAD_SCALES = {
    "shape": (replaced(torch.ones(LAYERS, 95)), r"calibrate, block -1: expected .*'output_scale': \(4, 96\)"),
    "missing": (lambda reply: {"output_scale": reply["output_scale"]}, "calibrate, block -1: expected"),
    "integers": (replaced(torch.ones(LAYERS, 96, dtype=torch.int64)), "expected floating-point output_scale"),
    "nan": (replaced(torch.full((LAYERS, 96), torch.nan)), "calibrate: expected finite scales"),
    "infinite": (replaced(torch.full((LAYERS, 96), torch.inf)), "calibrate: expected finite scales"),
    "negative": (replaced(torch.full((LAYERS, 96), -1.0)), "calibrate: expected finite scales from 0, not negative"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", BAD_SCALES)
def test_wrong_scales_are_refused(save, prompt, kind: str) -> None:
    """A reply that is no scale loses the party, keeps nothing of it, and the next prefill asks again."""
    plain, path = save()
    keys, ids = keys_for(plain), prompt(6).cpu()
    model = load_secure_model(path, keys)
    change, message = BAD_SCALES[kind]
    party = Lying(stand_in(plain, keys), change)
    encode_llama(model, keys, "cpu", untrusted=party)
    with pytest.raises(PartyLostError, match=message):
        model(ids)
    assert model.model._scx.party.scale is None
    assert not party.party.conversations
    party.is_honest = True
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_restored_conversation_keeps_its_scale(save, prompt) -> None:
    """Another party takes a conversation up without being asked for the scale again."""
    plain, path = save()
    keys = keys_for(plain)
    model = load_secure_model(path, keys)
    party = Lying(stand_in(plain, keys), lambda reply: reply)
    encode_llama(model, keys, "cpu", untrusted=party)
    ids = prompt(7).cpu()
    cache = model(ids[:, :6]).past_key_values
    scale = model.model._scx.party.scale
    party.party = stand_in(plain, keys)
    with record_transcript(model) as transcript:
        restore_conversation(model, cache)
    assert transcript.requests["calibration"] == 0
    assert model.model._scx.party.scale is scale
    logits = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits, plain(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_generator_for_a_configuration() -> None:
    """The sizes are the model's, with and without a head size in the configuration."""
    for model in (tiny_model("qwen3", head_dim=32, hidden_size=96), tiny_model("mistral")):
        keys, expected = SCXKeyGenerator.for_config(model.config), SCXKeyGenerator.for_model(model)
        assert (keys.hidden_dim, keys.qk_hidden_dim) == (expected.hidden_dim, expected.qk_hidden_dim)
    config = tiny_model("qwen2").config
    del config.head_dim
    assert SCXKeyGenerator.for_config(config).qk_hidden_dim == config.hidden_size // config.num_attention_heads
