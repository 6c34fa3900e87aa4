"""Offers: what a host has to know in order to take part in a job, and how agents are launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lockstep.errors import ProtocolError
from lockstep.net.blob_transfer import BlobInfo

if TYPE_CHECKING:
    pass

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class JobOffer:
    """A job that looks for hosts."""

    job: str
    """Names this run among all of the cluster; an agent's connections are of this job."""
    master: str
    """The name of the host that coordinates, as its certificate has it."""
    address: Address
    """Where the master listens for agents."""
    task: str
    """A name that every host can resolve: a recipe, `module:Task`, or `file.py:Task`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The explicit settings of the job, as `Host.start` takes them."""
    code: BlobInfo | None = None
    """The archive of the task's code, if hosts have to fetch it from the master."""
    data: BlobInfo | None = None
    """The data sets, likewise; or the file of `records`."""
    records: Mapping[str, Any] | None = None
    """Where there are predictions to be made: `{"path", "keep"}`, as `Host.start` takes them."""

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "job": self.job,
            "master": self.master,
            "address": list(self.address),
            "task": self.task,
            "args": dict(self.args),
            "settings": dict(self.settings),
            "code": None if self.code is None else asdict(self.code),
            "data": None if self.data is None else asdict(self.data),
            "records": None if self.records is None else dict(self.records),
        }

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> JobOffer:
        """The offer in a message.

        Raises:
            ProtocolError: it is none.
        """
        try:
            host, port = message["address"]
            texts = [message[name] for name in ("job", "master", "task")]
            if not all(isinstance(text, str) for text in (*texts, host)):
                raise TypeError("a name is not a text")
            return JobOffer(
                job=message["job"],
                master=message["master"],
                address=(host, int(port)),
                task=message["task"],
                args=dict(message["args"]),
                settings=dict(message["settings"]),
                code=BlobInfo.from_message(message["code"]),
                data=BlobInfo.from_message(message["data"]),
                records=_records(message["records"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                "an offer breaks the protocol",
                expected="job, master, address, task, args, settings, code, data and records",
                found=ascii(error)[:200],
            ) from None


def _records(message: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a message says of records, if it does. Raises TypeError, KeyError."""
    if message is None:
        return None
    path, keep = message["path"], message["keep"]
    if not all(isinstance(text, str) for text in (path, *keep)):
        raise TypeError("a name is not a text")
    return {"path": path, "keep": list(keep)}
