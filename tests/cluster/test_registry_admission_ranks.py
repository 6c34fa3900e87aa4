"""What a cluster decides: who is offered which job, which tasks a host takes, who a rank is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lockstep.agent.job_offer import OFFER, JobOffer
from lockstep.cluster.daemon.admission import Allowed, may_call, names_files, refusal
from lockstep.cluster.daemon.agent_processes import why
from lockstep.cluster.daemon.cluster_messages import FROM_HOSTS
from lockstep.cluster.daemon.reconnecting_line import LONGEST_PAUSE, pause
from lockstep.cluster.daemon.registry import (
    ConnectionLost,
    Event,
    HostJoined,
    JobClosed,
    JobOffering,
    JobStateChanged,
    Registry,
    decide,
    parse,
)
from lockstep.cluster.ranks.rank_environment import RankInfo, first_host, rank_info
from lockstep.errors import (
    JobError,
    ProtocolError,
)
from lockstep.net.blob_transfer import BlobInfo
from lockstep.system.messages import ErrorMessage, encode

NOWHERE = ("127.0.0.1", 9)


def an_offer(task: str = "mnist", job: str = "job", master: str = "a") -> JobOffer:
    return JobOffer(job=job, master=master, address=NOWHERE, task=task)


def told(board: Registry, *events: Event) -> tuple[Registry, list[tuple[str, str]]]:
    """The board after some events, and who was told what after the last one."""
    commands: tuple[object, ...] = ()
    for event in events:
        board, commands = decide(board, event)
    return board, [(each.to, type(each.message).__name__) for each in commands]  # type: ignore[attr-defined]


def test_a_job_is_offered_to_all_who_are_there_and_who_come() -> None:
    board, said = told(
        Registry(), HostJoined("b", 2), HostJoined("a", 1), JobOffering("@1", an_offer())
    )
    assert said == [("@1", "JobOpened"), ("b", "JobOffered")]  # not to its master
    board, said = told(board, HostJoined("c", 1))
    assert said == [("c", "JobOffered")]
    board, said = told(board, JobStateChanged("c", "job", "taken", ""), ConnectionLost("c"))
    assert said == [("@1", "HostReport")]  # its agent is lost
    board, said = told(board, JobClosed("@2", "job"))
    assert said == []  # it is another's
    board, said = told(board, JobClosed("@1", "job"))
    assert said == [("a", "JobWithdrawn"), ("b", "JobWithdrawn")]
    assert not told(board, HostJoined("d", 1))[1]


def test_a_job_ends_with_who_offers_it() -> None:
    board, said = told(
        Registry(), HostJoined("b", 2), JobOffering("@1", an_offer()), ConnectionLost("@1")
    )
    assert said == [("b", "JobWithdrawn")]
    assert not board.open_jobs
    board, said = told(board, JobOffering("g", an_offer(master="g")), JobOffering("@1", an_offer()))
    assert said == [("@1", "RequestFailed")]
    assert board.open_jobs["job"].asker == "g"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"op": "TakeJobs"},
        {"op": "TakeJobs", "workers": 0},
        {"op": "TakeJobs", "workers": "1"},
        {"op": "OpenJob", "offer": {}},
        {"op": "OpenJob", "offer": "x"},
        {"op": "JobReport", "job": "j", "state": "odd", "why": ""},
        {"op": ["CloseJob"], "job": "j"},
    ],
)
def test_messages_that_say_nothing(message: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse("b", FROM_HOSTS.decode(msgspec.msgpack.encode(message)))


@pytest.mark.parametrize(
    ("task", "allow", "found"),
    [
        ("mnist", (), None),
        ("/x/y.py:Task", ("/x/y.py",), "the path of a file"),
        ("os:system", (), "the module 'os'"),
        ("os:system", ("o", "system", "lockstep"), "the module 'os'"),
        ("tests.support.named_tasks:Blobs", ("tests",), None),
        ("tests.support.named_tasks:Blobs", ("tests.support.named_tasks:Blobs",), None),
        (
            "tests.support.named_tasks:Other",
            ("tests.support.named_tasks:Blobs",),
            "the module 'tests.support.named_tasks'",
        ),
        ("nowhere.at.all:Task", ("nowhere",), "none in the folder"),
    ],
)
def test_which_tasks_a_host_takes(task: str, allow: tuple[str, ...], found: str | None) -> None:
    error = refusal(an_offer(task), Allowed(modules=allow), "b")
    if found is None:
        assert error is None
    else:
        assert isinstance(error, JobError)
        assert "host b" in error.what
        assert found in error.found


@pytest.mark.parametrize(
    "task",
    [
        "..:Task", "tests/../os:system", "tests..support:Task", "tests.support:os system", ":Task",
        "tests.support.named_tasks:Blobs()", "tests.*:Task", "mni/st", "../mnist", "a:b:c", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("code", [BlobInfo(digest="ab" * 32, nbytes=10), None])
def test_names_that_are_no_names_of_python(task: str, code: BlobInfo | None) -> None:
    offer = msgspec.structs.replace(an_offer(task), code=code)
    rules = Allowed(modules=("tests", task), code=("ab" * 32,))
    error = refusal(offer, rules, "b")
    assert error is not None
    assert error.found == "something else in its name"


def test_a_path_is_not_in_the_code_that_was_allowed() -> None:
    code = BlobInfo(digest="ab" * 32, nbytes=10)
    offer = msgspec.structs.replace(an_offer("digits.py:Digits"), code=code)
    error = refusal(offer, Allowed(code=(code.digest,)), "b")
    assert error is not None
    assert "the path of a file" in error.found


@pytest.mark.parametrize(
    ("args", "taken"),
    [
        ({"label": "income", "epochs": 2.0, "width": 8, "data": None}, True),
        ({"data": "{below}/table.csv"}, True),
        ({"data": "{below}"}, True),
        ({"data": "/etc/passwd"}, False),
        ({"data": "{below}/../secret.csv"}, False),
        ({"data": "{below}/link"}, False),
        ({"data": "table.csv"}, False),
        ({"data": ["/etc/passwd"]}, False),
        ({"data": "a\0b"}, False),
        ({"others": "/etc/passwd"}, False),
    ],
)
def test_files_that_recipes_may_read(args: dict[str, object], taken: bool, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "link").symlink_to("/etc")
    placed = {
        name: value.format(below=below) if isinstance(value, str) else value
        for name, value in args.items()
    }
    offer = msgspec.structs.replace(an_offer("clicks"), args=placed)
    error = refusal(offer, Allowed(data=(str(below),)), "b")
    assert (error is None) == taken
    if error is not None:
        assert "--data" in error.fix
    if args.get("data") is not None:
        assert refusal(offer, Allowed(), "b") is not None
        assert names_files(offer), "errors about them stay here"


def test_what_may_be_called() -> None:
    of_package = Allowed(modules=("tests",))
    by_name = Allowed(modules=("tests.support.named_tasks:small_blobs",))
    offer = an_offer("tests.support.named_tasks:small_blobs")
    assert refusal(offer, of_package, "b") is None, (
        "it may be a Task: that is seen once it is there"
    )
    assert not may_call(offer, of_package)
    assert may_call(offer, by_name)
    assert not may_call(an_offer("tests.support.named_tasks:blobs"), by_name)
    assert may_call(an_offer("mnist"), Allowed())


def test_records_that_are_not_sent() -> None:
    fields = {**msgspec.to_builtins(an_offer()), "records": {"path": "/etc/passwd", "keep": []}}
    fields["records"]["op"], fields["op"] = "RecordsRequest", "JobOffer"
    with pytest.raises(ProtocolError):
        OFFER.decode(msgspec.msgpack.encode(fields))


def test_pauses_between_attempts_are_bounded() -> None:
    pauses = [pause(failures) for failures in (*range(8), 10**6)]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < 1
    assert pauses[-1] == LONGEST_PAUSE


def test_how_an_agent_ended() -> None:
    error = JobError("no such task", expected="one", found="none", fix="write it")
    assert why(0, b"") is None
    assert str(why(2, encode(ErrorMessage.of(error)))) == str(error)
    for code, said, found in ((-9, b"", "signal 9"), (1, b"[]", "exit code 1")):
        died = why(code, said)
        assert died is not None
        assert died.found == found


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "r",
    "TORCHELASTIC_RESTART_COUNT": "3",
}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_NNODES": "3",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "4",
    "SLURM_JOB_NODELIST": "node[07-09]",
}


def test_places() -> None:
    assert rank_info(TORCHRUN) == RankInfo(
        rank=1, size=2, host="10.0.0.1", port=29501, job="torchrun 10.0.0.1:29500 r 3"
    )
    assert rank_info(SLURM) == RankInfo(
        rank=2, size=3, host="node07", port=15000 + 70005 % 15000, job="slurm 70001 4 0"
    )
    assert rank_info({**SLURM, "MASTER_ADDR": "10.0.0.7"}).host == "10.0.0.7"


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({}, "nothing says which process"),
        ({**TORCHRUN, "LOCAL_RANK": "1"}, "several processes of the job are on this host"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, "several processes of the job are on this host"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "the variable MASTER_ADDR is missing"),
        ({**TORCHRUN, "RANK": "-1"}, "the variable RANK is no number"),
        ({**TORCHRUN, "RANK": "2"}, "this process has an impossible rank"),
        ({**SLURM, "SLURM_LOCALID": "1"}, "several processes of the job are on this host"),
        ({**SLURM, "SLURM_NNODES": "2"}, "several processes of the job are on this host"),
    ],
)
def test_places_that_cannot_be(environment: dict[str, str], what: str) -> None:
    with pytest.raises(JobError, match=what):
        rank_info(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a1,b[2-3]", "a1"),
        ("node[07-09,12],login", "node07"),
        ("node[3,1]", "node3"),
        ("r[1-2]n[04-05].x", "r1n04.x"),
    ],
)
def test_the_first_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
