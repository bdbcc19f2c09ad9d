"""The connection between the parties: who is let in, who is in nobody's way, and what somebody in its middle can do."""

import copy
import os
import pickle
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from workers import SECONDS, SECURE, WORKER, Bytes, honest, running, split_model

from scx import record_transcript
from scx.__main__ import main
from scx.models.llama import model_shape
from scx.party import PartyLostError, Plan
from scx.party.boundary import Request
from scx.party.channel import Channel, ChannelError, dial
from scx.party.credentials import Credentials
from scx.party.door import Door
from scx.party.exchange import Worker
from scx.party.messages import read_agreement, write_agreement, write_reply
from scx.party.process import RemoteParty, serve

NEW = 4
PLAN = Plan(4, 1, 1)
Change = Callable[[bytes, Callable[[], bytes]], bytes | None]


def reach(remote: RemoteParty) -> socket.socket:
    host, port = remote.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), SECONDS)


def soon() -> float:
    return time.monotonic() + SECONDS


@torch.no_grad()
def check_tokens(model, prompt) -> None:
    ids = prompt(9).cpu()
    expected = tiny_model(layers=4).cpu().generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)


# Credentials


def test_a_pair_in_files(tmp_path) -> None:
    """What is written can be read again and joins the other half; only its owner may have read it."""
    for credentials, name in ((SECURE, "secure"), (WORKER, "worker")):
        credentials.save(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            credentials.save(tmp_path / name)
    ours, theirs = (Credentials.load(tmp_path / name) for name in ("secure", "worker"))
    assert (ours.role, theirs.role) == ("secure side", "worker")
    with socket.create_server(("127.0.0.1", 0)) as server:
        right = Channel(socket.create_connection(server.getsockname()), theirs)
        left = Channel(server.accept()[0], ours)
        with running(lambda: left.handshake(soon())):
            right.handshake(soon())


def test_the_command_makes_a_pair(tmp_path, capsys) -> None:
    place = tmp_path / "new" / "pair"
    assert main(["pair", str(place)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [Credentials.load(file).role for file in files] == ["secure side", "worker"]
    before = [file.read_bytes() for file in files]
    assert main(["pair", str(place)]) == 1
    assert "is there, and its pair may be in use" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_use_is_refused(tmp_path, mode: int) -> None:
    WORKER.save(tmp_path / "worker")
    (tmp_path / "worker").chmod(mode)
    with pytest.raises(PermissionError, match=f"mode {mode:o}"):
        Credentials.load(tmp_path / "worker")


def test_what_is_no_file_is_refused_at_once(tmp_path) -> None:
    """A pipe into which nobody writes holds up nobody; nor does a directory, or a file that is larger than any pair."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(0o700)
    (tmp_path / "large").touch(0o600)
    (tmp_path / "large").write_bytes(bytes(2**20))
    for name in ("pipe", "directory", "large"):
        with pytest.raises(ValueError, match="credentials: "):
            Credentials.load(tmp_path / name)


def test_other_files_are_refused(tmp_path) -> None:
    """Empty, cut, foreign, and with parts of another half. No error quotes what was read."""
    for credentials, name in ((SECURE, "secure"), (WORKER, "worker")):
        credentials.save(tmp_path / name)
    (key, *own), (_, *other) = (
        re.findall("-+BEGIN [^-]*-+\n[^-]*-+END [^-]*-+\n", (tmp_path / name).read_text())
        for name in ("worker", "secure")
    )
    whole = [key, *own]
    assert "".join(whole) == (tmp_path / "worker").read_text()
    wrong = ([], ["secret words"], [key], whole[:2], own, [key, *other], [key, own[0], own[0]], ["".join(whole)[:-40]])
    for number, held in enumerate(wrong):
        path = tmp_path / f"wrong {number}"
        path.touch(0o600)
        path.write_text("".join(held))
        with pytest.raises(ValueError, match="credentials: ") as refused:
            Credentials.load(path)
        assert "secret" not in str(refused.value)


def test_credentials_show_no_key() -> None:
    """They are neither pickled nor copied, and print whose they are."""
    assert repr(WORKER) == "Credentials(worker)"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="credentials are neither pickled nor copied"):
            leave(WORKER)


def test_halves_are_not_exchanged() -> None:
    shape = model_shape(tiny_model(layers=4))
    _, remote = split_model()
    with pytest.raises(ValueError, match="expected those of the secure side, got those of the worker"):
        RemoteParty(remote.plan, shape.fingerprint, credentials=WORKER)
    with pytest.raises(ValueError, match="expected those of the worker, got those of the secure side"):
        serve(remote.address, SECURE, None, None, None, shape.fingerprint)
    with pytest.raises(ValueError, match="they were given, and with them no worker's"):
        remote.save_worker_credentials("nowhere")
    remote.close()


# The door


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process listens."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                words = struct.pack(f"={size // 4}I", *(int(host[i : i + 8], 16) for i in range(0, 2 * size, 8)))
                found.add((socket.inet_ntop(family, words), int(port, 16)))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="waits for a system that lists its sockets there")
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_it_listens_where_it_was_told_alone(host: str) -> None:
    """One socket, on the host given, and none once it is closed."""
    before = listening()
    remote = RemoteParty(PLAN, "", host=host)
    own = (host, int(remote.address.split(":")[1]))
    assert listening() - before == {own}
    remote.close()
    assert own not in listening()


def without_certificate(remote: RemoteParty, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, version
    with context.wrap_socket(reach(remote)) as sock:
        return sock.recv(2**16)


def with_another_certificate(remote: RemoteParty) -> bytes:
    other = Credentials.generate()[1]
    stranger = Credentials(other._key, other._certificate, SECURE._certificate)
    heard = bytearray(1)
    dial(remote.address, stranger, soon()).source(soon())(memoryview(heard))
    return bytes(heard)


STRANGERS: dict[str, Callable[[RemoteParty], bytes]] = {
    "no certificate": without_certificate,
    "TLS 1.2": lambda remote: without_certificate(remote, ssl.TLSVersion.TLSv1_2),
    "another certificate": with_another_certificate,
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_nobody(prompt, kind: str) -> None:
    """Without the paired certificate one is told nothing and is no worker, and the next to come is the first."""
    model, remote = split_model()
    with pytest.raises((ssl.SSLError, ChannelError), match="(?i)alert|version|certificate"):
        STRANGERS[kind](remote)
    with running(honest(remote.address)):
        remote.connect()
        assert repr(remote).endswith("worker=1)")
        check_tokens(model, prompt)
        remote.close()


JUNK = (
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\xff\xff" + bytes(70000),
    bytes(range(256)) * 16,
    b"\xff" * 100,
)


def test_junk_on_the_port(prompt) -> None:
    """Bytes that are no handshake, before workers come and while one works, are nobody's."""
    model, remote = split_model()

    def throw() -> None:
        for data in JUNK:
            with reach(remote) as sock, suppress(ConnectionError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(SECONDS)
                answer = sock.recv(2**16)
                assert answer[:1] in (b"", b"\x15"), "an alert of TLS at most"

    throw()
    with running(honest(remote.address)):
        remote.connect()
        throw()
        check_tokens(model, prompt)
        remote.close()


def test_strangers_hold_up_nobody(prompt) -> None:
    """More silent connections than are asked at once, and a worker is let in all the same. The first of them went."""
    model, remote = split_model()
    with ExitStack() as stack:
        silent = [stack.enter_context(reach(remote)) for _ in range(100)]
        with running(honest(remote.address)):
            begun = time.monotonic()
            remote.connect()
            assert time.monotonic() - begun < SECONDS / 2
            check_tokens(model, prompt)
            silent[0].settimeout(SECONDS)
            with suppress(ConnectionError):
                assert silent[0].recv(1) == b""
            remote.close()


def test_a_slow_handshake_ends() -> None:
    """Who has not shown a certificate in time is let go, however busy they are."""
    door = Door("127.0.0.1", 0, SECURE, write_agreement(PLAN, ""), seconds=0.3)
    begun = time.monotonic()

    def drip(sock: socket.socket) -> None:
        sock.sendall(b"\x16\x03\x01\x10\x00")
        while time.monotonic() - begun < SECONDS:
            sock.sendall(b"\0")
            time.sleep(0.02)

    with socket.create_connection(("127.0.0.1", door.port)) as sock, pytest.raises(ConnectionError):
        drip(sock)
    door.close()


def test_a_worker_refuses_another_secure_side() -> None:
    """One that has not the paired certificate is told nothing of the model, nor is anything else that listens."""
    parts, fingerprint = (None, None, None), "of no model"
    other = RemoteParty(PLAN, "", credentials=Credentials.generate()[0])
    with pytest.raises(ChannelError, match="(?i)certificate"):
        serve(other.address, WORKER, *parts, fingerprint, SECONDS)
    other.close()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        address = f"127.0.0.1:{plain.getsockname()[1]}"

        def answer() -> None:
            with plain.accept()[0] as sock:
                sock.sendall(b"".join(write_agreement(PLAN, fingerprint)))
                sock.recv(2**16)

        with running(answer), pytest.raises(ChannelError):
            serve(address, WORKER, *parts, fingerprint, SECONDS)
        with pytest.raises(ChannelError, match="it was late|timed out"):
            serve(address, WORKER, *parts, fingerprint, 0.3)


# Workers and their turns


def join(remote: "RemoteParty | Middle") -> Channel:
    """A worker that has agreed and waits for its turn."""
    channel = dial(remote.address, WORKER, soon())
    read_agreement(channel.source(soon()))
    channel.send(write_reply(0, {}), soon())
    return channel


def waiting(remote: RemoteParty, count: int) -> None:
    """Wait until so many have joined."""
    while len(remote._door._waiting) < count:
        time.sleep(0.01)


def test_who_is_gone_is_passed_over(prompt) -> None:
    """Workers that died before their turn, or spoke before it, cost neither time nor the turn of the next."""
    model, remote = split_model()
    gone, loud = join(remote), join(remote)
    waiting(remote, 2)
    with running(honest(remote.address)):
        waiting(remote, 3)
        gone.end()
        loud.send(write_reply(1, {}), soon())
        time.sleep(0.1)
        begun = time.monotonic()
        remote.connect()
        assert time.monotonic() - begun < 1
        check_tokens(model, prompt)
        remote.close()


def test_who_does_not_agree_holds_up_nobody(prompt) -> None:
    """A worker that never answers the agreement has not joined, and the next one has."""
    model, remote = split_model()
    dial(remote.address, WORKER, soon())
    with running(honest(remote.address)):
        remote.connect()
        check_tokens(model, prompt)
        remote.close()


def test_another_model_is_told_and_leaves(prompt) -> None:
    """The secure side turns to the next worker, and says why if there is none."""
    model, remote = split_model()
    with pytest.raises(ValueError, match="model: the secure side expects [0-9a-f]{16}, this is [0-9a-f]{16}"):
        honest(remote.address, model=tiny_model(layers=3).cpu())()
    remote.timeout = timedelta(seconds=0.3)
    with pytest.raises(PartyLostError, match="no worker joined .* sent away: it failed: ValueError: model: the secure"):
        remote.connect()
    remote.timeout = timedelta(seconds=SECONDS)
    with running(honest(remote.address)):
        remote.connect()
        check_tokens(model, prompt)
        remote.close()


def test_workers_end_with_the_secure_side() -> None:
    """The one that works and the one that waits, when it is closed and when nobody holds it any more."""
    for leave in (RemoteParty.close, lambda _: None):
        remote = RemoteParty(PLAN, model_shape(tiny_model(layers=4)).fingerprint, credentials=SECURE)
        (door,) = (x for x in threading.enumerate() if x.name == f"workers at {remote.address}")
        with running(honest(remote.address)), running(honest(remote.address)):
            remote.connect()
            waiting(remote, 1)
            leave(remote)
            del remote
        door.join(SECONDS)
        assert not door.is_alive()


@torch.no_grad()
def test_a_reply_that_nobody_waits_for(prompt) -> None:
    """It is neither in the way of the next request, nor taken for its reply; who waits after all gets it."""
    model, remote = split_model()
    rule, rows = model.model._scx.party.boundary.rule, torch.randn(2, 1, 300, 96)
    with running(honest(remote.address)):
        remote.connect()

        def begin(operation: str, **tensors: Tensor) -> Callable[[], Mapping[str, Tensor]]:
            return remote.begin(Request(operation, "one", "prefill", 0, 0, 0, 0, tensors), rule)

        begin("open")()
        left = [begin("project_qkv", attention_input=x) for x in rows]
        check_tokens(model, prompt)
        for wait, x in zip(left, rows, strict=True):
            torch.testing.assert_close(wait()["query_product"], model.model.layers[0].self_attn.q_proj(x))
        remote.close()


def test_an_interruption_leaves_no_half_message() -> None:
    """Where reading breaks off, by Ctrl-C as well, nobody goes on with the rest of that reply."""

    class Interrupted(Bytes):
        def fill(self, buffer: memoryview) -> None:
            raise KeyboardInterrupt

    worker = Worker(Interrupted(b""), 1)
    request = Request("select", "one", "generation", -1, 1, 0, 0, {})
    exchange = worker.begin(request, {}, 1.0)
    with pytest.raises(KeyboardInterrupt):
        worker.finish(exchange, 1.0)
    with pytest.raises(PartyLostError, match="select, block -1: worker 1 is lost: interrupted"):
        worker.finish(exchange, 1.0)
    with pytest.raises(PartyLostError, match="select, block -1: worker 1 is not connected"):
        worker.begin(request, {}, 1.0)


# In the middle


class Middle:
    """Somebody between a worker and the secure side who passes records of TLS on, and keeps and changes them.

    Args:
        remote: the secure side. Workers come to `address`.
        change: of the `target` th records that come from "worker" or "secure" once `is_on`: what is passed on in place
            of it and the next one, if that is wanted; None to close the connection.
    """

    def __init__(self, remote: RemoteParty, target: str = "", change: Change | None = None) -> None:
        self.remote, self.target, self.change = remote, target, change
        self.is_on = False
        self.seen: dict[str, bytearray] = {"worker": bytearray(), "secure": bytearray()}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def stand(self) -> None:
        with self.listener, self.listener.accept()[0] as worker, reach(self.remote) as secure:
            back = Thread(target=self.pass_on, args=("secure", secure, worker))
            back.start()
            self.pass_on("worker", worker, secure)
            back.join()

    def pass_on(self, source: str, left: socket.socket, right: socket.socket) -> None:
        with suppress(OSError), left.makefile("rb") as records:
            while record := self.read(records):
                self.seen[source] += record
                if self.is_on and source == self.target and self.change is not None:
                    change, self.change = self.change, None
                    changed = change(record, lambda: self.read(records))
                    if changed is None:
                        break
                    record = changed
                right.sendall(record)
        for sock in (left, right):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def read(records: BinaryIO) -> bytes:
        head = records.read(5)
        return head + records.read(int.from_bytes(head[3:]))


def flipped(record: bytes, bit: int) -> bytes:
    changed = bytearray(record)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


CHANGES: dict[str, Change] = {
    "alters the first bit": lambda record, _: flipped(record, 8 * 5),
    "alters the last bit": lambda record, _: flipped(record, 8 * len(record) - 1),
    "alters the length": lambda record, _: flipped(record, 8 * 4),
    "replays": lambda record, _: record + record,
    "reorders": lambda record, following: following() + record,
    "drops": lambda record, _: b"",
    "drops and goes on": lambda record, following: following(),
    "cuts a record off": lambda record, _: record[:-1],
    "inserts a record": lambda record, _: b"\x17\x03\x03\x00\x20" + bytes(32) + record,
    "inserts an alert": lambda record, _: b"\x15\x03\x03\x00\x02\x01\x00" + record,
    "closes": lambda record, _: None,
}


@pytest.mark.parametrize("target", ["worker", "secure"])
@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_in_the_middle(prompt, kind: str, target: str) -> None:
    """Whoever changes what passes, either way, ends the connection: no token comes of it."""
    model, remote = split_model(1.0)
    middle = Middle(remote, target, CHANGES[kind])
    with running(middle.stand), running(honest(middle.address)):
        remote.connect()
        cache = model(prompt(9).cpu()).past_key_values
        middle.is_on = True
        with pytest.raises(PartyLostError, match="worker 1 is lost"):
            model(prompt(1).cpu(), past_key_values=cache)
        assert middle.change is None
        assert cache.get_seq_length() == 9
        remote.close()


@pytest.mark.parametrize("target", ["worker", "secure"])
def test_in_the_middle_of_the_handshake(target: str) -> None:
    """An altered handshake makes no worker, whichever side it came from."""
    _, remote = split_model()
    middle = Middle(remote, target, lambda record, _: flipped(record, 8 * (len(record) - 20)))
    middle.is_on = True
    with running(middle.stand), pytest.raises(ChannelError):
        join(middle)
    assert middle.change is None
    assert not remote._door._waiting
    remote.close()


@torch.no_grad()
def test_in_the_middle_nothing_is_read(prompt) -> None:
    """Somebody who passes everything on unchanged sees no word of a header and no piece of a tensor."""
    model, remote = split_model()
    middle = Middle(remote)
    with running(middle.stand), running(honest(middle.address)), record_transcript(model) as transcript:
        remote.connect()
        check_tokens(model, prompt)
        with reach(remote) as again:
            again.sendall(middle.seen["worker"])
            with suppress(ConnectionError):
                while again.recv(2**16):
                    pass
        assert not remote._door._waiting, "what was recorded makes no second worker"
        remote.close()
    seen = b"".join(middle.seen.values())
    assert len(seen) > transcript.nbytes()
    fingerprint = model_shape(tiny_model(layers=4)).fingerprint.encode()
    words = [b"operation", b"tensors", b"attend", b"torch.float32", b"plan", fingerprint[:8]]
    sent = [x.tensor.flatten().view(torch.uint8).numpy().tobytes() for x in transcript.received() if x.nbytes >= 64]
    pieces = [x[:8] for x in sent if any(x[:8])]
    assert len(pieces) > 10
    assert not [x for x in words + pieces if x in seen]
