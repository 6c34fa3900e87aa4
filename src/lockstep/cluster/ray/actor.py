"""Ray actor: what Ray runs on each node; it has a key made there, and then an agent's process.

The private key never leaves the node, and no secret goes through Ray: the actor asks for a
certificate, and is given it with its order. The agent is a process of its own, so that its memory,
signals and forks are not those of Ray's worker; it dies with the actor.
"""

from __future__ import annotations

import queue

from lockstep.agent.job_offer import OFFER
from lockstep.cluster.daemon.agent_processes import Agents, Ended
from lockstep.errors import LockstepError
from lockstep.net import certificate_authority as authority
from lockstep.system.folders import TemporaryFolder
from lockstep.system.messages import ErrorMessage, encode


class RayAgent:
    """The actor. `end` is called while `serve` waits, so it needs two threads."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()
        self._folder = TemporaryFolder("lockstep-ray-")
        self._identity = self._folder.path / "node"
        self._serves = False

    def request(self, name: str) -> bytes:
        """Make a key; returns the request (PEM) for a certificate with this name."""
        return authority.make_request(self._identity, name)

    def serve(self, certificate: bytes, ca: str, offer: bytes, workers: int, host: str) -> bytes:
        """Have an agent take part in a job, until it ends.

        Args:
            certificate: what was asked for, in PEM.
            ca: the certificate of the job's CA, in PEM.
            offer: the job, a `JobOffer` encoded.
            workers: how many workers this host would run.
            host: the address that other hosts reach this one at.

        Returns:
            Why it ended, an `ErrorMessage` encoded; nothing if it should.
        """
        self._serves = True
        agents = Agents(self._events.put)
        with self._folder:
            try:
                authority.store(self._identity, certificate, ca)
                code = self._folder.path / "code"
                code.mkdir()
                agents.start(
                    OFFER.decode(offer),
                    identity=str(self._identity),
                    workers=workers,
                    host=host,
                    folder=code,  # who may submit to Ray's cluster may run code here anyway
                )
                ended = self._events.get()
                error = ended.error if ended else None
            except LockstepError as failure:
                error = failure
            finally:
                agents.close()
        return b"" if error is None else encode(ErrorMessage.of(error))

    def end(self) -> None:
        """Have the agent end, if there is one, and leave nothing behind."""
        if self._serves:
            self._events.put(None)
        else:
            self._folder.close()
