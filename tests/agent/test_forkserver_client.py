"""The agent's end of the conversation with the forkserver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lockstep.agent.forkserver_client import LOAD_SECONDS, ForkServerClient
from lockstep.errors import WorkerLostError
from lockstep.planning.forkserver_messages import Preload, Preloaded


@pytest.fixture
def client() -> Iterator[ForkServerClient]:
    client = ForkServerClient.start(os.environ)
    yield client
    client.close()


def test_what_woke_the_agent_was_taken_by_a_question_meanwhile(client: ForkServerClient) -> None:
    """A worker's word, met in the same look, makes the agent ask for a fork: the answer comes after
    the message that woke it, and nothing is left to hear. The forkserver is as well as ever."""
    client.hear()
    client.ask(Preload(), Preloaded, LOAD_SECONDS)
    client.hear()


def test_it_has_ended(client: ForkServerClient) -> None:
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"was killed by SIGKILL"):
        client.ask(Preload(), Preloaded, LOAD_SECONDS)
    with pytest.raises(WorkerLostError):
        client.hear()
