"""Harmful hosts: what some hosts of `benchmarks.chaos_hosts` do, as code that agents run first."""

from __future__ import annotations

HARMS = {
    "a host that goes mute": """
from lockstep.collectives import exchange_thread as e
exchange, begun = e.ExchangeThread._exchange, []
def mute(self, step):
    begun.append(step)
    if len(begun) > 40:
        while not self._stop.wait(0.05):
            pass
        raise e.CalledOff
    exchange(self, step)
e.ExchangeThread._exchange = mute
""",
    "a host without memory": """
import random
from lockstep.collectives import exchange_thread as e
exchange = e.ExchangeThread._exchange
def fail(self, step):
    if random.random() < 0.02:
        raise MemoryError
    exchange(self, step)
e.ExchangeThread._exchange = fail
""",
    "a host that sends random values": """
import random
import msgspec
from lockstep.agent import host_messages as m
from lockstep.agent.regroup_messages import HostStatus
from lockstep.net.control_link import ControlLink
tell = ControlLink.tell
def number():
    return random.choice([0, 1, 2, random.randrange(50), random.randrange(1 << 20)])
def some():
    return random.choice([None, number(), float(number()), "x" * random.randrange(99), [], {}])
def step():
    return random.choice([None, number(), number() << 20])
def odd(message):
    change = {
        m.HostPaused: lambda: {"status": HostStatus(whole=step(), snapshot=step())},
        m.ExchangeTrouble: lambda: {"other": random.choice(["", "b", "c", "d", "master", "e"])},
        m.HostReady: lambda: {"workers": 1 + number() % 65536},
        m.EventForwarded: lambda: {"fields": {"host": some(), "step": some(), "how": some()}},
        m.Recovered: lambda: {"recoveries": [{"step": some(), "how": some(), "x": some()}]},
    }.get(type(message))
    return message if change is None else msgspec.structs.replace(message, **change())
def send(self, peer, message):
    tell(self, peer, odd(message) if random.random() < 0.2 else message)
    if random.random() < 0.01:
        tell(self, peer, odd(m.ExchangeTrouble(generation=number(), other="", why="?")))
ControlLink.tell = send
""",
}
"""By what is said of such a host. `tests.support.agents_on_loopback` runs it."""
