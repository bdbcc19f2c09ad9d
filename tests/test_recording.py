"""What would take an encoded model down for later: pickles, copies, exported and captured programs, compilers."""

import copy
import io
import logging
import pickle

import pytest
import torch
from tiny import difference, tiny_model

from scx import SCXKeyGenerator, decode_llama, encode_llama
from scx.keystream import Secret


@pytest.fixture
def encoded(llama):
    return encode_llama(llama, SCXKeyGenerator.for_model(llama, redundant_num=3, alp=True))


class TestPickles:
    @pytest.mark.parametrize("path", ["", "model", "model.layers.1", "model.layers.1.self_attn"])
    def test_refused(self, encoded, path) -> None:
        for write in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
            with pytest.raises(TypeError, match="an encoded model holds keys and is never pickled"):
                write(encoded.get_submodule(path))

    def test_weights_and_the_plain_model_are_free(self, encoded) -> None:
        pickle.dumps(encoded.state_dict())
        pickle.dumps(decode_llama(encoded))

    @torch.no_grad()
    @pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
    def test_copies_are_encoded_as_well(self, encoded, prompt, how) -> None:
        twin = how(encoded)
        assert type(twin.model) is type(encoded.model)
        assert difference(twin(prompt(5)).logits, encoded(prompt(5)).logits) < 1e-4


class TestPrograms:
    """A recorded pass would be replayed with its one-time keys."""

    def test_export(self, encoded, prompt) -> None:
        with pytest.raises(RuntimeError, match="cannot be recorded by torch.export or torch.jit"):
            torch.export.export(encoded, (prompt(5),), {"use_cache": False}, strict=False)

    def test_trace(self, encoded, prompt) -> None:
        with pytest.raises(RuntimeError, match="cannot be recorded by torch.export or torch.jit"):
            torch.jit.trace(lambda ids: encoded(ids, use_cache=False).logits, (prompt(5),))

    def test_cuda_graph(self, encoded, prompt, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be recorded by a CUDA graph"):
            encoded(prompt(5))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["permuted", "sealed"])
@torch.no_grad()
def test_a_compiler_sees_no_key(prompt, encoding, monkeypatch, caplog) -> None:
    """It guards on values that it finds, and prints its guards: no secret is among them, and none is a constant."""
    revealed, reveal = set(), Secret.reveal
    monkeypatch.setattr(Secret, "reveal", lambda secret: revealed.add(bytes(reveal(secret))) or reveal(secret))
    model, ids = tiny_model(layers=1), prompt(6)
    plain = model(ids).logits
    encode_llama(model, SCXKeyGenerator.for_model(model, redundant_num=2, alp=True, cache_encoding=encoding))
    torch._dynamo.reset()
    torch._logging.set_logs(guards=True, recompiles=True, bytecode=True, graph_code=True)
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("torch").addHandler(handler)
    try:
        compiled = torch.compile(model, backend="eager")
        first, second = compiled(ids), compiled(ids)
        step = compiled(ids[:, :1], past_key_values=first.past_key_values)
    finally:
        logging.getLogger("torch").removeHandler(handler)
        torch._logging.set_logs()
        torch._dynamo.reset()
    assert difference(first.logits, plain) < 1e-4
    assert difference(second.logits, plain) < 1e-4
    expected = tiny_model(layers=1)(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1:]
    assert difference(step.logits, expected) < 1e-4
    assert first.past_key_values.session_id != second.past_key_values.session_id
    printed = text.getvalue() + caplog.text
    assert "GUARDS" in printed
    assert len(revealed) > 5
    assert not [value for value in revealed if repr(value)[2:-1] in printed or value.hex() in printed]
