"""Gloo transport: over `torch.distributed`, to measure against, and where only that works.

What it cannot do, and so does not promise:

- It authenticates nobody and encrypts nothing. Use it in networks that you trust entirely.
- A wait that runs out of time closes all connections, with every peer: gloo knows no other way.
- It does not tell a peer of another size than expected by name; gloo may end the process.
- A peer's death shows only where a tensor of it is waited for. `hear` does not tell of it.
- The hosts are fixed. Steps count modulo 8192, and a tag has at most 16 bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from weakref import WeakSet

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from lockstep.errors import NetworkError, ProtocolError
from lockstep.net.frames import HEADER, TENSORS, Kind, message_frame
from lockstep.net.handshake import HELLO, Ascii, Facts, Hello, check_hello
from lockstep.net.pending import as_bytes, timed_out
from lockstep.net.sockets import closed
from lockstep.net.transport import Heard, Key
from lockstep.system.messages import Codec, Message, encode

MAX_STEP, MAX_TAG = 1 << 13, 1 << 16
_SLOTS = {kind: index for index, kind in enumerate(sorted(TENSORS))}


class StoredMessage(Message):
    """A message, and who has left it in the store."""

    sender: Ascii
    body: bytes


STORED: Codec[StoredMessage] = Codec(StoredMessage)


class GlooTransport:
    """A `Transport` for hosts that all know the same store. Its constructor waits for all."""

    def __init__(
        self,
        nodes: Sequence[str],
        store: Store,
        *,
        node: str,
        job: str,
        facts: Facts,
        timeout: float,
        codec: Codec[Message] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """Connect `node` with all others of `nodes`, over the interface that `host` is at.

        `store` is this host's own client of it; messages go over it.

        Raises:
            RefusedError: a host differs in its facts.
            PeerTimeoutError: not all are there within `timeout` seconds.
        """
        self.node, self._nodes, self._codec = node, sorted(nodes), codec
        prefix = f"lockstep-net/{job}"
        self._store: Store | None = PrefixStore(prefix, store)
        # Another client, because a wait keeps one to itself.
        self._hearing: Store | None = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._heard = 0
        self._group: ProcessGroupGloo | None = None
        self._pending: WeakSet[GlooPending] = WeakSet()
        self._error: NetworkError | None = None
        self._lock = threading.Lock()
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout)
        try:
            self._compare(Hello(job=job, node=node, facts=dict(facts)), timeout)
            rank, size = self._nodes.index(node), len(self._nodes)
            self._group = ProcessGroupGloo(self._store, rank, size, options)
        except RuntimeError as error:
            others = " or ".join(self.peers)
            raise timed_out(others, "its connections", timeout, str(error)[:200]) from error

    @property
    def peers(self) -> tuple[str, ...]:
        return () if self._error else tuple(name for name in self._nodes if name != self.node)

    def send(self, peer: str, key: Key, data: memoryview) -> GlooPending:
        pending = GlooPending(self, peer, f"that host {peer} takes {key}", data)
        pending.start("send", self._rank(peer, pending.what), slot(key))
        return pending

    def expect(self, peer: str, key: Key, into: memoryview) -> GlooPending:
        pending = GlooPending(self, peer, f"{key} from host {peer}", into)
        pending.start("recv", self._rank(peer, pending.what), slot(key))
        return pending

    def tell(self, peer: str, message: Message) -> None:
        self._rank(peer, f"that host {peer} takes a message")
        body = message_frame(Kind.CONTROL, message)[HEADER.size :]
        stored = encode(StoredMessage(sender=self.node, body=body))
        with self._lock:
            assert self._store is not None
            number = self._store.add(f"told/{peer}", 1)
            self._store.set(f"told/{peer}/{number}", _text(stored))

    def hear(self, timeout: float) -> Heard:
        key = f"told/{self.node}/{self._heard + 1}"
        if self._hearing is None:
            raise closed(f"host {self.node}", "a message", "it ended here")
        try:
            self._hearing.wait([key], timedelta(seconds=timeout))
        except RuntimeError as error:
            raise timed_out(" or ".join(self.peers), "a message", timeout, "none") from error
        stored = STORED.decode(_bytes(self._hearing.get(key)))
        self._hearing.delete_key(key)
        self._heard += 1
        if self._codec is None:
            raise ProtocolError(f"host {stored.sender} sends a message", expected="tensors alone")
        return Heard(
            peer=stored.sender, message=self._codec.decode(stored.body), nbytes=len(stored.body)
        )

    def drop(self, peer: str, reason: str) -> None:
        """Close what connects to all peers."""
        if peer in self._nodes:
            self._end(closed(f"host {peer}", "nothing any more", f"dropped here: {reason}"))

    def close(self) -> None:
        self._end(closed(f"host {self.node}", "nothing any more", "it ended here"))

    def fail(self, error: NetworkError) -> None:
        """Let every further call raise this error; the group is of no use any more."""
        self._error = self._error or error

    def begin(self, pending: GlooPending, direction: str, rank: int, slot: int) -> Work:
        """Start gloo's `send` or `recv` of the memory of `pending`."""
        assert self._group is not None
        tensor = torch.frombuffer(pending.memory, dtype=torch.uint8)
        work: Work = getattr(self._group, direction)([tensor], rank, slot)
        self._pending.add(pending)
        return work

    def _end(self, error: NetworkError) -> None:
        """Let go of everything that holds gloo's connections open."""
        self.fail(error)
        for pending in list(self._pending):
            pending.give_up(error)
        self._group = self._store = self._hearing = None

    def _compare(self, ours: Hello, timeout: float) -> None:
        assert self._store is not None
        self._store.set(f"hello/{self.node}", _text(encode(ours)))
        for name in self._nodes:
            if name != self.node:
                self._store.wait([f"hello/{name}"], timedelta(seconds=timeout))
                theirs = HELLO.decode(_bytes(self._store.get(f"hello/{name}")))
                check_hello(ours, theirs, name)

    def _rank(self, peer: str, what: str) -> int:
        if self._error is not None:
            raise self._error.awaiting(what)
        if peer not in self._nodes or peer == self.node:
            raise closed(f"host {peer}", what, "no connection")
        return self._nodes.index(peer)


class GlooPending:
    """A send or a receipt by gloo. `done` is told only of what somebody has waited for."""

    def __init__(self, transport: GlooTransport, peer: str, what: str, memory: memoryview) -> None:
        self.peer, self.what = peer, what
        self.memory = as_bytes(memory)
        self._transport = transport
        self._work: Work | None = None
        self._error: NetworkError | None = None
        self._lock = threading.Lock()

    def start(self, direction: str, rank: int, slot: int) -> None:
        """Begin; nothing is sent where there is nothing to send."""
        if self.memory.readonly:
            self.memory = memoryview(bytearray(self.memory))  # torch takes no other
        if self.memory:
            try:
                self._work = self._transport.begin(self, direction, rank, slot)
            except RuntimeError as error:
                raise self._failed(error, 0.0) from error

    @property
    def ended(self) -> bool:
        return self._work is None

    def done(self) -> bool:
        return self._work is None and self._error is None

    def wait(self, timeout: float) -> None:
        with self._lock:
            try:
                if self._work is not None:
                    self._work.wait(timedelta(seconds=timeout))
            except RuntimeError as error:
                raise self._failed(error, timeout) from error
            if self._error is not None:
                raise self._error.awaiting(self.what)
            self._work = None

    def give_up(self, error: NetworkError) -> None:
        """Let every further wait raise this error, unless it is complete."""
        if self._work is not None:
            self._error, self._work = error, None

    def _failed(self, error: RuntimeError, timeout: float) -> NetworkError:
        found = str(error).partition("] ")[2][:200] or str(error)[:200]
        lost = closed(f"host {self.peer}", self.what, found)
        self._transport.fail(lost)
        self._error, self._work = lost, None
        if "Timed out" in str(error):
            return timed_out(self.peer, self.what, timeout, found)
        return lost


def _text(body: bytes) -> str:
    """Bytes in the form in which the store takes them."""
    return body.hex()


def _bytes(text: bytes) -> bytes:
    """What `_text` was given."""
    try:
        return bytes.fromhex(text.decode())
    except ValueError:
        raise ProtocolError("the store holds what no host has left there") from None


def slot(key: Key) -> int:
    """The 31 bits that name a key for gloo.

    Raises:
        ProtocolError: it is no tensor's, or the tag has more than 16 bits.
    """
    if key.kind not in _SLOTS or not 0 <= key.tag < MAX_TAG:
        raise ProtocolError(
            f"gloo cannot send {key}", expected=f"a tensor with a tag below {MAX_TAG}"
        )
    return (_SLOTS[key.kind] * MAX_STEP + key.step % MAX_STEP) * MAX_TAG + key.tag
