"""The attacks work: what the documents call broken is broken here, in front of the reader, and what they promise to
hide is not read."""

import json
from pathlib import Path

import pytest
import torch
from parity import needs
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from scx import SCXKeyGenerator, encode_llama, encoded_llama, record_transcript
from scx.__main__ import main
from scx.audit import (
    AttentionMemory,
    find_feature_order,
    link_rows,
    nearest_tokens,
    one_token_rows,
    read_first_block,
    realness,
    recorded_inputs,
    rows_heard,
    undo_feature_order,
)
from scx.commands.audit import report
from scx.commands.audit.cases import CASES, area_under_curve, run_cases
from scx.commands.audit.report import Finding
from scx.commands.audit.subject import Subject
from scx.party.untrusted import UntrustedParty
from scx_kernels.provenance import provenance

TOKENS = 40


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("alp", [False, True])
def test_first_block_reads_the_prompt_from_a_permuted_cache(prompt, family: str, alp: bool) -> None:
    """Permutations within heads, redundant rows and removable noise do not hide a stored V from who has weights."""
    model, ids = tiny_model(family), prompt(40, 2)
    with torch.no_grad(), encoded_llama(model, SCXKeyGenerator.for_model(model, redundant_num=20, alp=alp)):
        values = model(ids).past_key_values.layers[0].values
    assert torch.equal(read_first_block(model, values), ids)


def test_first_block_reads_nothing_from_noise(prompt) -> None:
    """The attack is no oracle: from rows that hold no prompt it reads no prompt."""
    model, ids = tiny_model(), prompt(200)
    found = read_first_block(model, torch.randn(1, 2, 200, 16, device=ids.device))
    assert (found == ids).float().mean() < 10 / VOCABULARY


def speaking_model(family: str = "llama") -> PreTrainedModel:
    """A random model in which a row is mostly its own token's, as in trained ones, and little of its context."""
    model = tiny_model(family, layers=5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.1
    return model


# By attack, of each finding in order the least and the most share that is read, or that the area under the curve is.
ALL, MOST, SOME, NOTHING = (1.0, 1.0), (0.8, 1.0), (0.4, 1.0), (0.0, 0.1)
SHARES = {
    "values": [ALL, NOTHING, ALL, ALL, ALL],
    "rows": [MOST, MOST, *2 * [MOST, MOST, MOST, SOME, SOME]],
    "order": [ALL, ALL],
    "links": [ALL],
    "decoys": 5 * [MOST],
    "noise": [(0.05, 0.9), (0.0, 0.5)],
    "low-bits": [(0.0, 0.0)],
    "generated": 3 * [MOST],
    "features": [(0.99, 1.0), NOTHING, (0.99, 1.0), (0.0, 0.2)],
}


@torch.no_grad()
@pytest.mark.parametrize("attack", SHARES)
def test_every_attack_reads_what_is_promised_or_conceded(prompt, attack: str) -> None:
    """No less, so that what is broken is said, and no more, where something is promised: of a sealed cache nothing,
    of fresh feature keys what a guess gives."""
    own = prompt(60, batch=8, seed=1)
    subject = Subject(speaking_model(), prompt(TOKENS), own, redundant=20, noise=10.0, new_tokens=9)
    findings = run_cases(subject, [attack])
    assert len(findings) == len(SHARES[attack])
    for finding, (least, most) in zip(findings, SHARES[attack], strict=True):
        assert finding.share is not None
        assert least <= finding.share <= most, finding


def test_every_attack_is_tested() -> None:
    """Going on alone is a perplexity (tests/test_bench_statelessness.py)."""
    assert CASES.keys() == SHARES.keys() | {"alone"}


def test_going_on_alone_is_measured(prompt) -> None:
    subject = Subject(speaking_model(), prompt(TOKENS), prompt(60, batch=2), redundant=0, noise=0.0)
    plain, ends, everything = run_cases(subject, ["alone"])
    with torch.no_grad():
        logits = subject.model(subject.own_text).logits[:, 40:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), subject.own_text[:, 41:].flatten())
    assert plain.value == pytest.approx(loss.exp().item(), rel=1e-4)
    assert ends.value != plain.value != everything.value
    assert (plain.measure, plain.share) == ("perplexity", None)


@torch.no_grad()
def test_without_noise_and_redundant_rows_the_first_block_is_ordered_as_well(prompt) -> None:
    subject = Subject(tiny_model(), prompt(VOCABULARY // 3), prompt(8), redundant=0, noise=0.0)
    subject.prompt = subject.prompt.unique()[None]  # equal tokens have equal rows
    few, paper = run_cases(subject, ["order"])
    assert few.share == paper.share == 1.0
    assert few.setting.endswith("blocks 1 to 3")
    assert run_cases(subject, ["decoys", "noise"]) == []


# What attackers see


@torch.no_grad()
@pytest.mark.parametrize("crossings", ["few", "paper"])
def test_a_listener_knows_the_untrusted_sides_rows(prompt, monkeypatch, crossings: str) -> None:
    """Also those that it makes itself between two messages."""
    model, projected, fed = tiny_model(layers=5), [], []
    project, feed = UntrustedParty._project, UntrustedParty._feed_forward

    def spy(party, held, block, rows):
        reply = project(party, held, block, rows)
        projected.append((rows, reply["value_product"]))
        return reply

    monkeypatch.setattr(UntrustedParty, "_project", spy)
    monkeypatch.setattr(
        UntrustedParty, "_feed_forward", lambda party, block, rows: fed.append(rows) or feed(party, block, rows)
    )
    encode_llama(model, SCXKeyGenerator.for_model(model, redundant_num=3, alp=True), "cpu", crossings=crossings)
    with record_transcript(model) as transcript:
        model(prompt(9))
    heard = rows_heard(model, transcript)
    assert [len(rows) for rows in vars(heard).values()] == [5, 5, 5, 5]
    for block, (rows, product) in enumerate(projected):
        torch.testing.assert_close(heard.attention_input[block], rows)
        torch.testing.assert_close(heard.value_product[block], product)
        torch.testing.assert_close(heard.feed_forward_input[block], fed[block])


@torch.no_grad()
def test_memory_holds_what_attention_reads(prompt) -> None:
    """Of a permuted cache that is what is stored, bit by bit."""
    model, ids = tiny_model(), prompt(9)
    with encoded_llama(model, SCXKeyGenerator.for_model(model)), AttentionMemory() as memory:
        cache = model(ids).past_key_values
    assert len(memory.keys) == len(memory.values) == 3
    for layer, keys, values in zip(cache.layers, memory.keys, memory.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


# What they make of it


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_one_token_rows_are_the_models(family: str) -> None:
    """Of any token: what the plain model makes of it behind the first one."""
    model, first = tiny_model(family), 5
    table = one_token_rows(model, 3, first)
    assert list(table) == [
        ("attention_input", 0),
        ("feed_forward_input", 0),
        ("attention_input", 1),
        ("feed_forward_input", 1),
        ("attention_input", 2),
    ]
    for token in (0, 100, VOCABULARY - 1):
        ids = torch.tensor([[first, token]], device=model.device)
        blocks = list(enumerate(model.model.layers))
        places = {("attention_input", i): block.self_attn.q_proj for i, block in blocks}
        places |= {("feed_forward_input", i): block.post_attention_layernorm for i, block in blocks}
        with recorded_inputs(list(places.values())) as recorded:
            model(ids)
        states = {place: rows[0, 1] for place, (rows,) in zip(places, recorded, strict=True)}
        for place, rows in table.items():
            torch.testing.assert_close(rows[token].float(), states[place], rtol=2e-3, atol=2e-3)


def test_the_nearest_row_is_by_direction() -> None:
    """About the table's mean, whatever the length, in any part of the table."""
    table = torch.randn(10_000, 8, dtype=torch.float64).float() + 3
    mean = table.mean(dim=0)
    tokens = torch.tensor([0, 4095, 4096, 9_999])
    assert torch.equal(nearest_tokens(mean + 7 * (table[tokens] - mean), table), tokens)


@torch.no_grad()
def test_a_norm_does_not_hide_a_row(llama) -> None:
    """Its weight is known; the length that it takes away is not needed."""
    norm, table = llama.model.layers[0].input_layernorm, torch.randn(VOCABULARY, 96, device=llama.device)
    norm.weight.copy_(torch.rand(96, device=llama.device) + 1e-2)
    assert torch.equal(nearest_tokens(norm(5 * table), table, norm), torch.arange(VOCABULARY, device=llama.device))


def test_rows_that_link_to_nothing_are_said_to(prompt) -> None:
    model = tiny_model()
    rows = torch.randn(1, 6, 96, device=model.device)
    layer, after = model.model.layers[:2]
    with torch.no_grad():
        following = after.input_layernorm(rows + layer.mlp(layer.post_attention_layernorm(rows)))
    order = torch.tensor([3, 0, 5, 1])
    mixed = torch.cat((following[:, order], torch.randn(1, 2, 96, device=model.device)), dim=1)
    assert link_rows(model, 0, rows, mixed)[0].tolist() == [3, 0, 5, 1, -1, -1]


def test_rows_like_decoys_are_not_called_real() -> None:
    """The likelihood is no oracle: of rows that are all drawn as decoys are, it prefers none; of real ones that are
    correlated it does."""
    mixing, count = torch.randn(32, 32), 400
    own, real = (torch.randn(count, 32) @ mixing for _ in range(2))
    scale = own.abs().median(dim=0).values / 0.6745
    drawn = [torch.randn(count, 32) * scale for _ in range(2)]
    first, second = (realness(rows, own) for rows in drawn)
    assert area_under_curve(first, second) == pytest.approx(0.5, abs=0.1)
    assert area_under_curve(realness(real, own), first) > 0.95
    assert area_under_curve(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_a_feature_order_is_found_and_undone() -> None:
    plain, rest = torch.randn(2, 3, 64), torch.randn(2, 5, 64)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    encoded, later = (x.gather(2, order[:, None].expand(x.shape)) for x in (plain, rest))
    found = find_feature_order(plain, encoded)
    assert torch.equal(found, order)
    assert torch.equal(undo_feature_order(later, found), rest)


# What is told of it

FINDINGS = [
    Finding("V of block 1", "fused", "stored cache, sealed", "tokens", 3, 1200, 0.25),
    Finding("decoys told from real rows", "split", "few crossings", "AUC", 0.5, None, 0.5, 0.625),
    Finding("going on alone", "split", "all blocks locked", "perplexity", 1234.5, None, 1.0),
]


def test_figures_in_words() -> None:
    assert [x.figure for x in FINDINGS] == ["3 of 1,200 tokens", "AUC 0.500 to 0.625", "perplexity 1,234.5"]
    assert [x.share for x in FINDINGS] == [0.0025, 0.5, None]


@needs("matplotlib", "rich")
def test_findings_are_printed_written_and_drawn(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    about = provenance()
    settings = {"model": "tiny", "tokens": 1200, "redundant": 2, "noise": 10.0}
    report.print_table(FINDINGS)
    printed = capsys.readouterr().out
    assert all(x.figure in printed and x.setting in printed for x in FINDINGS)
    written = json.loads(report.write(tmp_path / "a.json", about, settings, FINDINGS).read_text())
    assert written["settings"] == settings
    assert {"processor", "threads", "packages", "commit", "command"} <= written["provenance"].keys()
    assert [Finding(**x) for x in written["findings"]] == FINDINGS
    picture = report.draw(tmp_path / "a.png", about, settings, FINDINGS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_attacks_by_name(monkeypatch) -> None:
    """And no others; what it hands on is what `run` takes."""
    given = {}
    monkeypatch.setattr("scx.commands.audit.run", lambda **options: given.update(options))
    assert main(["audit", "--tokens", "9", "--only", "values", "rows", "--json", "x.json"]) == 0
    assert given["only"] == ["values", "rows"]
    assert (given["tokens"], given["json"], given["picture"]) == (9, Path("x.json"), None)
    with pytest.raises(SystemExit):
        main(["audit", "--only", "telepathy"])
