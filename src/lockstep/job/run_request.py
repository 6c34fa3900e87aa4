"""Run request: a job as it was asked for, with the settings that were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.errors import JobError
from lockstep.job.job import SETTINGS, Job
from lockstep.job.task import Task
from lockstep.job.task_resolution import check_not_resolving
from lockstep.job.task_source import TaskSource, source_of

Taskish = Task | str | Job


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A job as far as it is known before its task is loaded."""

    job: Job
    given: Mapping[str, Any]
    """The settings that were given: they take precedence over a recipe's."""
    source: TaskSource

    @staticmethod
    def of(
        task: Taskish, args: Mapping[str, Any] | None, settings: Mapping[str, Any]
    ) -> RunRequest:
        """The request for a task with settings.

        Raises:
            JobError: a setting is unknown or out of range, or the job describes a cluster, or the
                caller is imported by another run.
        """
        check_not_resolving()
        job = task if isinstance(task, Job) else Job(task=task, args=dict(args or {}))
        job = job.replace(**settings)
        if job.cluster is not None:
            raise JobError(
                "the job describes a cluster, whose processes are started one by one",
                expected="a job without `cluster`",
                found=f"cluster = {dict(job.cluster)}",
                fix="on each host: lockstep rank --task worker:0 JOB; or leave `cluster` out",
            )
        default = Job(task="")
        given = {
            name: getattr(job, name)
            for name in SETTINGS
            if name in settings or getattr(job, name) != getattr(default, name)
        }
        return RunRequest(job=job, given=given, source=source_of(job))

    @staticmethod
    def recorded(source: TaskSource, settings: Mapping[str, Any]) -> RunRequest:
        """The request of a run that has a manifest with these settings."""
        check_not_resolving()
        return RunRequest(job=Job(task="", **settings), given=dict(settings), source=source)

    def completed(self, recipe: Mapping[str, Any]) -> Job:
        """The job, with its recipe's settings where none was given."""
        settings = {**recipe, **self.given}
        if "steps" in self.given and "data_epochs" not in self.given:
            settings.pop("data_epochs", None)
        if "data_epochs" in self.given and "steps" not in self.given:
            settings.pop("steps", None)
        return self.job.replace(**settings)
