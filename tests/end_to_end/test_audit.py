"""Silent corruption is found, named and put right; slow workers hold back one shard only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest

import lockstep
from lockstep.errors import IntegrityError, NonFiniteError
from lockstep.job.faults import Fault
from lockstep.planning.sampling import home_shards
from lockstep.state.fault_injection import SLOW_SECONDS
from tests.zoo import ZOO

CNN = ZOO["cnn"]
SETTINGS: dict[str, Any] = {"workers": 3, "shards": 6, "threads": 1, "steps": 8, "quiet": True}


def train(out: str, **settings: Any) -> lockstep.Result:
    return lockstep.run(CNN.task, out=out, **{**CNN.settings(), **SETTINGS, **settings})


def events(result_folder: Any, name: str) -> list[dict[str, Any]]:
    lines = (result_folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_flipped_gradient_bit_is_found_and_put_right(run_folders: Callable[[], str]) -> None:
    clean = train(run_folders())
    flip = Fault(worker_id=-1, step=3, phase="slot", kind="flip")
    audited = train(run_folders(), audit=1.0, faults=(flip,))
    assert audited.fingerprint == clean.fingerprint
    (found,) = events(audited.folder, "corrupt")
    assert found["step"] == 3
    assert found["shard"] in range(6)
    unaudited = train(run_folders(), faults=(flip,))
    assert unaudited.fingerprint != clean.fingerprint, "the fault did not change anything"


def test_a_flipped_parameter_bit_is_found_and_put_right(run_folders: Callable[[], str]) -> None:
    clean = train(run_folders())
    flip = Fault(worker_id=2, step=4, phase="barrier", kind="flip")
    audited = train(run_folders(), audit=1.0, faults=(flip,))
    assert audited.fingerprint == clean.fingerprint
    (found,) = events(audited.folder, "corrupt")
    assert (found["step"], found["worker"]) == (4, 2)
    assert found["tensor"] in dict(CNN.task.model().named_parameters())
    ledgers = [(result.folder / "ledger.jsonl").read_bytes() for result in (clean, audited)]
    assert ledgers[0] == ledgers[1]
    with contextlib.suppress(NonFiniteError):  # others may compute with it in the same step
        assert train(run_folders(), faults=(flip,)).fingerprint != clean.fingerprint


def test_a_state_that_changes_again_and_again_stops_the_run(run_folder: str) -> None:
    flip = Fault(worker_id=2, step=4, phase="barrier", kind="flip", repeat=True)
    with pytest.raises(IntegrityError, match="changed in memory 3 times between steps 3 and 4"):
        train(run_folder, audit=1.0, faults=(flip,))


def test_an_audit_changes_nothing(run_folders: Callable[[], str]) -> None:
    clean, audited = train(run_folders()), train(run_folders(), audit=0.3)
    assert audited.fingerprint == clean.fingerprint
    assert events(audited.folder, "corrupt") == []


def test_a_slow_worker_holds_back_only_the_shard_that_it_is_on(
    run_folders: Callable[[], str],
) -> None:
    settings = {"workers": 2, "shards": 12, "steps": 10}
    clean = train(run_folders(), **settings)
    slow = Fault(worker_id=1, step=0, phase="load", kind="slow")
    slowed = train(run_folders(), **settings, faults=(slow,))
    assert slowed.fingerprint == clean.fingerprint
    own = len(home_shards(12, 2, 1)) * SLOW_SECONDS * 10
    assert slowed.times["1"]["compute"] < 0.7 * own, "nobody took its shards over"
