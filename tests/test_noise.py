"""Rows under noise and the noise lie on one grid: no low bit of what is written or crosses says which row it was."""

from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from scx import SCXKeyGenerator, encoded_llama, record_transcript
from scx.audit import on_floats, on_grid, read_low_bits, read_noisy_rows
from scx.encoding import Noise, RowKey, noise_step
from scx.keys import ModelShape
from scx.keys.settings import NOISE_DISTRIBUTIONS
from scx.keystream import KeyStream, Secret
from scx.models.llama import model_shape
from scx.projections import project_quiet

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SCALE = 5.0


def keys_for(model: Any, **options: Any) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, alp=True, noise_scale=SCALE, **options)


def unit_of(model: Any) -> float:
    return SCALE * model_shape(model).first_norm_rms


class TestEveryWayIn:
    """`RowKey.enter` rounds rows to the grid, and rounds the exact sum once, whatever norm is before it."""

    @staticmethod
    def norms(dtype: torch.dtype) -> dict[str, nn.Module | None]:
        hooked = LlamaRMSNorm(24).to(dtype)
        hooked.register_forward_hook(lambda module, args, out: 0.7 * out)
        return {
            "none": None,
            "plain": LlamaRMSNorm(24).to(dtype),
            "hooked": hooked,
            "another dtype": LlamaRMSNorm(24).to(torch.bfloat16 if dtype == torch.float32 else torch.float32),
            "another norm": nn.LayerNorm(24).to(dtype),
        }

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
    @pytest.mark.parametrize("name", ["none", "plain", "hooked", "another dtype", "another norm"])
    @pytest.mark.parametrize("scale", [0.01, 5.0, 40.0])
    def test_sums(self, dtype: torch.dtype, name: str, scale: float) -> None:
        torch.manual_seed(1)
        norm, step = self.norms(dtype)[name], noise_step(scale)
        rows, redundant = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 3, 24).to(dtype)
        noise = Noise((2**24 * torch.randn(2, 8, 24)).int(), step)
        for key in (RowKey(torch.rand(2, 8).argsort(-1), redundant=redundant), RowKey()):
            plain = key.enter(rows, norm)
            added = noise if key.entry is not None else Noise(noise.steps[:, :5], step)
            expected = ((plain.double() / step).round() + added.steps) * step
            assert torch.equal(key.enter(rows, norm, added), expected.float())


def rows_under_noise(model: Any, ids: Tensor, placement: str) -> list[Tensor]:
    """The rows that the first block's projections are given, in a prefill with redundant rows and in a step."""
    keys, given = keys_for(model, redundant_num=5), []

    def spy(modules: Any, rows: Tensor, noise: Tensor, layer: int) -> list[Tensor]:
        given.append(rows)
        return project_quiet(modules, rows, noise, layer)

    options = {} if placement == "fused" else {"secure_device": "cpu", "crossings": placement}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), encoded_llama(model, keys, **options):
        patch.setattr("scx.models.fused.project_quiet", spy)
        if placement == "fused":
            model(ids[:, :1], past_key_values=model(ids).past_key_values)
            return given
        with record_transcript(model) as transcript:
            model(ids[:, :1], past_key_values=model(ids).past_key_values)
    return [x.tensor for x in transcript.select(name="attention_input") if x.block == 0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["fused", "few", "paper"])
def test_no_token_is_excluded(prompt, placement: str, dtype: torch.dtype) -> None:
    """For every token of the vocabulary there is noise that makes each row of it. Who takes noise for floats excludes
    the right one as he does all others, but for one by chance."""
    model = tiny_model(dtype=dtype)
    prefill, step = rows_under_noise(model, prompt(24), placement)
    assert prefill.shape[:2] == (1, 29)
    assert step.shape[:2] == (1, 1)
    for rows in (prefill, step):
        tokens, possible = read_low_bits(model, rows, on_grid(unit_of(model), noise_step(unit_of(model))))
        assert possible.eq(VOCABULARY).all()
        assert torch.equal(tokens, read_noisy_rows(model, rows))
        assert read_low_bits(model, rows, on_floats(unit_of(model)))[1].double().mean() < 0.2


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_on_floats_are_read(prompt, dtype: torch.dtype) -> None:
    """The attack is one: where noise is drawn, scaled and added in float32 it excludes every token but the right one.
    Rows that were not rounded to the grid are seen where they have finer bits."""
    model, ids = tiny_model(dtype=dtype), prompt(24)
    rows = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).float()
    drawn = KeyStream(Secret(bytes(32))).laplace("any", [(0, 0, 0)], rows.numel()).view(rows.shape)
    tokens, possible = read_low_bits(model, rows + drawn.float() * unit_of(model), on_floats(unit_of(model)))
    assert torch.equal(tokens, ids)
    assert possible.eq(1).all()
    if dtype != torch.float32:
        return
    step = noise_step(unit_of(model))
    unrounded = rows + (drawn * unit_of(model) / step).round().mul(step).float()
    assert read_low_bits(model, unrounded, on_grid(unit_of(model), step))[1].eq(0).all()


@pytest.mark.parametrize("distribution", NOISE_DISTRIBUTIONS)
def test_noise_takes_every_step(distribution: str) -> None:
    """Its last bits are uniform, small noise's as well as large one's."""
    shape = ModelShape(3, 96, 6, 2, 16, 211, 0.3, "test")
    keys = SCXKeyGenerator(
        10, 96, 16, master_key=bytes(32), alp=True, noise_scale=SCALE, noise_distribution=distribution
    )
    noise = keys.open_session(shape, 1, bytes(16)).take_noise(1, 10_000, CPU)
    size = noise.values().abs() / (SCALE * shape.first_norm_rms)
    for steps in (noise.steps[size < 0.1], noise.steps[size > 2.0]):
        seen = torch.bincount(steps % 16, minlength=16).double()
        expected = len(steps) / 16
        assert expected > 1000
        assert ((seen - expected) ** 2 / expected).sum() < 44.3  # 15 degrees of freedom, one in 10,000
