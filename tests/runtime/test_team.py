"""Threads that run one jitted function together: barriers, shares of work, and what must not stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edgemistral.runtime.team
from edgemistral.kernels.jit import entry
from edgemistral.kernels.sync import SYNC_SIZE, Member, barrier, take
from edgemistral.runtime.team import Team, compile_for


@entry
def phases_in_step(member, phases, spins, seen, own):
    """Every thread sees in each phase what all threads wrote in the one before; seen[0] counts violations."""
    rank, threads = member.rank, member.threads
    for phase in range(phases):
        seen[8 * (rank + 1)] = phase + 1
        waste = 0
        for i in range(spins * (1 + rank)):         # the threads arrive at different times
            waste += i * (waste ^ phase)
        own[0] += waste & 1
        barrier(member)
        for other in range(threads):
            if seen[8 * (other + 1)] != phase + 1:
                seen[0] += 1
        barrier(member)


def run_phases(team, phases=50, spins=100):
    seen, own = np.zeros(8 * (team.threads + 1), np.int64), [np.zeros(1, np.int64) for _ in range(team.threads)]
    common = phases, spins, seen
    compile_for(phases_in_step, common, own[0])
    team.run(phases_in_step, common, own)
    assert seen[0] == 0
    assert seen[8::8].tolist() == [phases] * team.threads


@pytest.fixture
def team():
    team = Team(2)
    yield team
    team.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_meet_at_barriers(threads):
    team = Team(threads)
    for phases in (1, 100, 3):
        run_phases(team, phases)
    team.close()


@entry
def take_all(member, total, least, firsts, lasts):
    """One thread takes every share; the number of shares."""
    n = 0
    while True:
        firsts[n], lasts[n] = take(member, total, least)
        if firsts[n] >= lasts[n]:
            return n
        n += 1


@settings(max_examples=200, deadline=None)
@given(threads=st.integers(1, 64), total=st.integers(0, 5000), least=st.integers(1, 64))
@example(threads=1024, total=1, least=1)
@example(threads=3, total=7, least=100)
def test_shares_cover_all_work_once(threads, total, least):
    firsts, lasts = np.zeros(5002, np.int64), np.zeros(5002, np.int64)
    member = Member(0, threads, np.zeros(SYNC_SIZE, np.int64), np.zeros(1, np.int64))
    n = take_all(member, total, least, firsts, lasts)
    assert firsts[:n].tolist() == [0, *lasts[: n - 1]][:n]
    assert n == 0 if total == 0 else lasts[n - 1] == total
    sizes = (lasts - firsts)[:n]
    assert (sizes[:-1] >= least).all()
    assert (np.diff(sizes) <= 0).all()


@entry
def count_shares(member, total, phases, taken, own):
    for _ in range(phases):
        while True:
            first, last = take(member, total, 1)
            if first >= last:
                break
            for i in range(first, last):
                taken[i] += 1
        barrier(member)


def test_threads_share_work_without_overlap():
    team, total = Team(3), 100_000
    compile_for(count_shares, (total, 1, np.zeros(1, np.int64)), 0)
    for phases in (1, 2, 7):                       # more phases than there are tickets
        taken = np.zeros(total, np.int64)
        team.run(count_shares, (total, phases, taken), [0, 0, 0])
        assert (taken == phases).all()
    team.close()


def threads_named():
    return {thread for thread in threading.enumerate() if thread.name.startswith("edgemistral-")}


def test_close_ends_the_threads_and_run_starts_new_ones():
    before, team = threads_named(), Team(2)
    for _ in range(2):
        run_phases(team)
        ours = threads_named() - before
        assert len(ours) == 2
        team.close()
        for thread in ours:
            thread.join(5)
            assert not thread.is_alive()
    team.close()                                   # twice is fine


def test_one_thread_needs_no_other():
    before, team = threads_named(), Team(1)
    run_phases(team)
    assert threads_named() == before


def test_any_thread_may_call(team):
    run_phases(team)
    caller = threading.Thread(target=run_phases, args=(team,))
    caller.start()
    caller.join(20)
    assert not caller.is_alive()
    run_phases(team)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_ctrl_c_ends_the_wait_but_not_the_run(team):
    run_phases(team)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            run_phases(team, phases=50, spins=3_000_000)
        waited = time.perf_counter() - started
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    team.wait()
    assert time.perf_counter() - started > 2 * waited
    run_phases(team)


def test_an_interrupt_at_any_instruction_leaves_the_team_usable():
    """Ctrl-C comes between any two bytecodes of the caller: also when one thread was started and the other was not."""
    run_phases(Team(2))

    def interrupted_at(instruction):
        """Whether a run was still going at that instruction."""
        team, count = Team(2), 0

        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_filename != edgemistral.runtime.team.__file__:
                return None
            frame.f_trace_opcodes = True
            count += event == "opcode"
            if count == instruction:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            run_phases(team, phases=2, spins=1)
            return False
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(previous)
            again = threading.Thread(target=run_phases, args=(team,), daemon=True)    # hangs alone if it does
            again.start()
            again.join(20)
            assert not again.is_alive(), instruction
            team.close()

    instruction = 1
    while interrupted_at(instruction):
        instruction += 1
    assert instruction > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_threads_of_its_own():
    """In a process of its own, because this one has threads that a fork would not copy."""
    code = """if True:
        import os, warnings
        from tests.runtime.test_team import Team, run_phases
        warnings.simplefilter("ignore", DeprecationWarning)
        team = Team(2)
        run_phases(team)
        child = os.fork()
        run_phases(team)
        team.close()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("both")
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "both\n", done.stderr
