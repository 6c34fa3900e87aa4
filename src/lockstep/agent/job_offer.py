"""Job offer: what a host has to know in order to take part in a job."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from lockstep.errors import LockstepError, NetworkError, WorkerLostError
from lockstep.net.blob_transfer import BlobInfo
from lockstep.system.messages import Codec, Label, Message, Port, Text, check_plain

Address = tuple[Label, Port]


class RecordsRequest(Message):
    """Which file takes the place of the task's data, where there are predictions to be made."""

    path: Text
    keep: Annotated[list[Text], msgspec.Meta(max_length=4096)]
    """The fields that go into the result as they are."""

    def as_request(self) -> dict[str, Any]:
        """As `LocalHost.start` takes it."""
        return {"path": self.path, "keep": list(self.keep)}


class JobOffer(Message):
    """A job that looks for hosts."""

    job: Annotated[Label, msgspec.Meta(min_length=1)]
    """Names this run among all of the cluster; an agent's connections are of this job."""
    master: Label
    """The name of the host that coordinates, as its certificate has it."""
    address: Address
    """Where the master listens for agents."""
    task: Label
    """A name that every host can resolve: a recipe, `module:Task`; among the ranks of a job, which
    were all started with the task, `file.py:Task`."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """The explicit settings of the job, as `LocalHost.start` takes them."""
    code: BlobInfo | None = None
    """The archive of the task's code, if hosts have to fetch it from the master."""
    data: BlobInfo | None = None
    """The data sets, likewise; or the file of `records`."""
    records: RecordsRequest | None = None

    def __post_init__(self) -> None:
        check_plain([self.args, self.settings])
        if self.records is not None and self.data is None:
            raise ValueError("records that are not sent along")


OFFER: Codec[JobOffer] = Codec(JobOffer, "an offer breaks the protocol")


def without_contents(error: LockstepError) -> LockstepError:
    """An error without what it says of files of this host, where they were named by another one:
    whoever named them does not see through it what is in them."""
    if isinstance(error, NetworkError | WorkerLostError):
        return error  # they speak of hosts and of processes
    return type(error)(
        "the task cannot be loaded or run on this host",
        expected="files as the task takes them",
        found="an error that is told there alone, since it may show what is in a file",
        fix="look at what `lockstep join` prints there",
    )
