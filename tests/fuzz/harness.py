"""What a harness is, and the child process in which its inputs run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from edgemistral.errors import EdgeMistralError

BATCH = 400              # inputs of a child
STUCK = 60.0             # seconds without a word after which an input hangs, whatever the machine is busy with
ADDRESSES = 3 << 30      # bytes of address space that a child may add
LONGEST = 3000           # characters of an error's message


class Failed(AssertionError):
    """An answer that is wrong."""


class Harness:
    """One border. `name` is also the beginning of its files below found/."""

    name = ""
    seconds = 4.0        # of processor time for one input
    memory = 384 << 20   # bytes that one input may add
    planted = ""         # which check `plant` takes away

    def prepare(self) -> None:
        """Once, in the parent: imports, seeds, compiled kernels. No threads may be left."""

    def start(self) -> None:
        """In each child, before its inputs."""

    def make(self, chance: Random) -> Any:
        """An input: a JSON value."""
        raise NotImplementedError

    def run(self, given: Any) -> str:
        """What came of it, in a word. Our own errors may pass; anything else that is raised is a fault."""
        raise NotImplementedError

    def plant(self) -> None:
        """In a child: take a check away."""
        raise NotImplementedError

    def outcome(self, given: Any) -> str:
        try:
            return self.run(given)
        except EdgeMistralError as error:
            message = str(error)
            if len(message) > LONGEST or not message.strip():
                raise Failed(f"a message of {len(message)} characters: {message[:200]!r}") from None
            return type(error).__name__

    def run_batch(self, seed: int, first: int, count: int, plant: bool = False) -> Iterator[tuple[int, str, str]]:
        """(number, outcome, details) of the inputs of one child or of several; details only of faults."""
        end = first + count
        while first < end:
            for number, outcome, details in _in_child(self, seed, first, end, plant):
                yield number, outcome, details
                first = number + 1

    def run_kept(self, given: Any) -> tuple[str, str]:
        """(outcome, details) of one input that was kept, in a child."""
        self.nth = lambda seed, number: given  # type: ignore[method-assign]
        try:
            [(_, outcome, details)] = self.run_batch(0, 0, 1)
            return outcome, details
        finally:
            del self.nth

    def nth(self, seed: int, number: int) -> Any:
        """An input again."""
        return self.make(Random(f"{self.name} {seed} {number}"))


@dataclass
class Tally:
    """What a run of a harness found."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


FAULTS = ("crash", "hang", "traceback", "slow", "memory")


def _in_child(harness: Harness, seed: int, first: int, end: int, plant: bool) -> Iterator[tuple[int, str, str]]:
    """Fork a child for the inputs first ... end - 1; the last that is given ended it, or was the last."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            _child(harness, seed, first, end, plant, writer)
            code = 0
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(writer, json.dumps(["fault", "traceback", traceback.format_exc()[-4000:]]).encode() + b"\n")
        finally:
            os._exit(code)
    os.close(writer)
    rest, number, died, hung = b"", first, True, False
    try:
        while True:
            if not select.select([reader], [], [], STUCK)[0]:
                hung = True
                break
            part = os.read(reader, 1 << 16)
            if not part:
                break
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                kind, *values = json.loads(line)
                if kind == "end":
                    died = False
                elif kind == "fault":        # outside of an input
                    yield number, values[0], values[1]
                    died = False
                else:
                    yield values[0], values[1], values[2]
                    number = values[0] + 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if hung or died else signal.SIGTERM)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    if hung:
        yield number, "hang", f"no outcome within {STUCK:.0f} s"
    elif died and number < end:
        yield number, "crash", f"the process ended: {os.waitstatus_to_exitcode(status)}"


def _child(harness: Harness, seed: int, first: int, end: int, plant: bool, writer: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if plant:
        harness.plant()
    harness.start()
    if sys.platform == "linux":
        limit = _address_space() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(*values: Any) -> None:
        os.write(writer, json.dumps(values).encode() + b"\n")

    for number in range(first, end):
        given = harness.nth(seed, number)
        outcome, details = attempt(harness, given)
        say("done", number, outcome, details)
    say("end")


def attempt(harness: Harness, given: Any) -> tuple[str, str]:
    """(outcome, details) of one input, in this process."""
    before, begun, details = _peak(), time.process_time(), ""
    try:
        outcome = harness.outcome(given)
    except MemoryError:
        outcome, details = "memory", traceback.format_exc()[-3000:]
    except BaseException:      # panics of Rust libraries are no Exceptions
        outcome, details = "traceback", traceback.format_exc()[-3000:]
    took, grown = time.process_time() - begun, _peak() - before
    if outcome not in FAULTS and took > harness.seconds:
        outcome, details = "slow", f"{took:.1f} s of processor time; {outcome}"
    elif outcome not in FAULTS and grown > harness.memory:
        outcome, details = "memory", f"{grown >> 20} MiB; {outcome}"
    return outcome, details


def _peak() -> int:
    """Most memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
