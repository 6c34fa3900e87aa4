"""Digest sample: which bytes of the state are digested at each step, and by whom."""

from __future__ import annotations

from typing import Any, cast

from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.memory_layout import Entry, Layout


def test_who_digests_what() -> None:
    """A parameter and its optimizer's state are its owner's; everything else is everybody's, and
    what nobody digests for all is in no unit."""
    kinds = {
        "a": "param", "b": "param", "a/momentum": "optim", "a.b/step": "optim", "frozen": "param",
        "a.b": "param", "mean": "buffer", "residual/0/a": "residual",
    }  # fmt: skip
    entries = tuple(
        Entry(
            name=name, kind=cast(Any, kind), dtype="float32", shape=(2048,), stride=(1,),
            offset=number * 8192, nbytes=8192,
        )
        for number, (name, kind) in enumerate(kinds.items())
    )  # fmt: skip
    audit = plan_digest_sample(Layout(
        entries=entries, blocks=(), trainable=("a", "b", "a.b"), state_bytes=65536, slots_bytes=0,
        exported=(),
    ))  # fmt: skip
    seen: dict[str, bool] = {}
    for step in range(0, 64 * audit.every, audit.every):
        apart, others = audit.split(step, {0, 1})
        assert sorted(apart | others) == list(range(len(audit.units(step))))
        seen |= {unit.name.partition("[")[0]: True for unit in apart.values()}
        seen |= {unit.name.partition("[")[0]: False for unit in others.values()}
        assert audit.split(step, ()) == ({}, dict(enumerate(audit.units(step))))
    assert seen == {
        "a": True, "b": True, "a/momentum": True, "a.b/step": False, "frozen": False, "a.b": False,
        "mean": False,
    }  # fmt: skip
