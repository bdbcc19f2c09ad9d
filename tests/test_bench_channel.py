"""What the channel is held against: the same messages, unprotected; and how both are shown."""

from tiny import tiny_model
from workers import SECONDS, parts_of, running

from bench.channel import ENCRYPTED, PLAIN, Unprotected
from bench.report import channel_table
from scx import SCXKeyGenerator, encode_llama
from scx.models.llama import model_shape
from scx.party.process import RemoteParty, serve
from scx.party.secure import split_plan


def test_the_rival_does_the_same_work(prompt) -> None:
    """Over TCP that nobody protects, tokens are the plain model's, too."""
    model, ids = tiny_model().cpu(), prompt(9).cpu()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    keys, shape, parts = SCXKeyGenerator.for_model(model), model_shape(model), parts_of(tiny_model().cpu())
    remote = RemoteParty(split_plan(keys, shape, "few", False), shape.fingerprint, credentials=Unprotected())
    with running(lambda: serve(remote.address, Unprotected(), *parts, shape.fingerprint, SECONDS)):
        remote.connect()
        encode_llama(model, keys, "cpu", untrusted=remote)
        assert (model.generate(ids, max_new_tokens=4, do_sample=False) == expected).all()
        remote.close()


def test_table() -> None:
    def contestant(name: str, median: float) -> dict:
        times = {"median": median, "q20": median, "q80": median}
        return {"name": name, "kind": "scx", "ms": times, "ratio": {key: x / 100 for key, x in times.items()}}

    entry = {"suite": "channel", "model": "tiny", "tokens": 9, "boundary_bytes": 2**20, "contestants": []}
    entry["contestants"] = [contestant(PLAIN, 100.0), contestant(ENCRYPTED, 107.0)]
    rows = channel_table({"cases": [entry]}).rows
    assert rows[1] == ("tiny, 9 tokens, 1 MiB", "TLS 1.3", "107 ms", "1.070 (1.070–1.070)")
