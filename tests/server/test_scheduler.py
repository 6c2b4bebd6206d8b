"""The queue by itself: turns, places, cancelling, closing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edgemistral.errors import Cancelled, EdgeMistralError
from edgemistral.server import scheduler
from edgemistral.server.scheduler import Job, Progress, QueueFull, Scheduler, Unavailable
from tests.serving import wait_for

DOWN = Unavailable("the server is shutting down", 10)


class Written:
    """An answer that needs no model: `work` is a function, or makes an iterator with a turn for each of its items."""

    def __init__(self, work):
        self._turns, self.task, self.ready = work(), None, True

    def deliver(self):
        return self._turns is None or next(self._turns, "end") == "end"


class Bench:
    """A scheduler of one answer at a time, with a first job that holds the compute thread until `go` is set."""

    def __init__(self, capacity=128):
        self.scheduler, self.go, self.done = Scheduler(capacity, parallel=1), threading.Event(), []
        self.first = Job("first", "first")
        self.scheduler.submit(self.first, [Written(lambda: self.work("first", wait=True))])
        wait_for(lambda: self.scheduler.running)

    def work(self, name, wait=False):
        if wait:
            assert self.go.wait(60)
        self.done.append(name)
        yield

    def submit(self, name, client, answers=1):
        job = Job(name, client)
        self.scheduler.submit(job, [Written(lambda: self.work(name)) for _ in range(answers)])
        return job

    async def finish(self):
        self.go.set()
        await asyncio.to_thread(wait_for, lambda: not self.scheduler.running and not self.scheduler.waiting)
        self.scheduler.close(DOWN)
        assert await asyncio.to_thread(self.scheduler.join, 60)
        return self.done[1:]


def run(test):
    """A coroutine function as a test."""
    def wrapper():
        asyncio.run(test())
    wrapper.__name__ = test.__name__
    return wrapper


async def collected(job):
    return [event async for batch in job.batches(5) for event in batch]


@run
async def test_clients_take_turns():
    bench = Bench()
    for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c"), ("b2", "b")):
        bench.submit(name, client)
    assert bench.scheduler.waiting == 6
    assert await bench.finish() == ["a1", "b1", "c1", "a2", "b2", "a3"]


@run
async def test_a_job_of_several_answers_lets_others_in_between():
    bench = Bench()
    bench.submit("a1", "a", answers=3)
    bench.submit("a2", "a")
    bench.submit("b1", "b")
    assert await bench.finish() == ["a1", "b1", "a1", "a1", "a2"]


@run
async def test_as_many_answers_as_allowed_are_written_at_once():
    scheduler, order = Scheduler(parallel=3), []

    def work(name):
        for _ in range(3):
            order.append(name)
            yield

    go = threading.Event()
    first = Job("first", "first")
    scheduler.submit(first, [Written(lambda: (go.wait(60) for _ in range(1)))])
    jobs = [Job(name, name) for name in "abcd"]
    for job in jobs:
        scheduler.submit(job, [Written(lambda job=job: work(job.id))])
    go.set()
    for job in jobs:
        await collected(job)
    assert sorted(order[:4]) != ["a"] * 4 and order.index("d") > order.index("c")
    assert len(set(order[order.index("a") : order.index("a") + 3])) > 1      # they alternate
    scheduler.close(DOWN)


@run
async def test_what_fails_in_one_answer_ends_its_job_and_no_other():
    scheduler, bad, good = Scheduler(parallel=4), Job("bad", "a"), Job("good", "b")

    def broken():
        yield
        raise MemoryError("too much")

    scheduler.submit(bad, [Written(broken), Written(lambda: iter(range(5)))])
    scheduler.submit(good, [Written(lambda: (good.emit(n) for n in range(5)))])
    with pytest.raises(MemoryError):
        await collected(bad)
    assert await collected(good) == list(range(5))
    scheduler.close(DOWN)


@run
async def test_an_event_that_is_handed_over_is_passed_on_before_the_work_goes_on():
    job, order = Job("a", "a"), []

    def work():
        job.hand_over("first")
        order.append("work goes on")
        job.emit("second")
        job.end()

    async def read():
        async for batch in job.batches(5):
            order.extend(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "HAND_OVER", 30.0)      # however busy the machine is
        await asyncio.gather(asyncio.to_thread(work), read())
    assert order == ["first", "work goes on", "second"]


@run
async def test_nobody_waits_for_a_reader_who_does_not_come():
    job = Job("a", "a")
    await asyncio.wait_for(asyncio.to_thread(job.hand_over, "first"), 1)
    assert not job.cancelled()


@run
async def test_a_full_queue_says_when_to_come_again():
    bench = Bench(capacity=4)
    bench.submit("a1", "a")
    bench.submit("a2", "a")
    with pytest.raises(QueueFull) as error:   # half of the places
        bench.submit("a3", "a")
    assert error.value.retry_after >= 1
    bench.submit("b1", "b")
    bench.submit("c1", "c")
    with pytest.raises(QueueFull):
        bench.submit("d1", "d")
    assert await bench.finish() == ["a1", "b1", "c1", "a2"]


@run
async def test_events_come_in_order_and_all_that_wait_at_once():
    scheduler, job = Scheduler(), Job("x", "a")

    def work():
        for i in range(1000):
            job.emit(i)
        yield

    scheduler.submit(job, [Written(work)])
    batches = [batch async for batch in job.batches(5)]
    assert [event for batch in batches for event in batch] == list(range(1000))
    assert len(batches) < 500
    scheduler.close(DOWN)


@run
async def test_progress_is_told_until_the_prompt_is_read():
    scheduler, job = Scheduler(), Job("x", "a")

    def work():
        for done in (4, 8, 9):
            job.progress(done, 9)
        yield

    scheduler.submit(job, [Written(work)])
    assert await collected(job) == [Progress(4, 9), Progress(8, 9)]
    scheduler.close(DOWN)


@run
async def test_an_empty_batch_tells_that_nothing_happened():
    bench = Bench()
    batches = bench.first.batches(0.01)
    assert [await anext(batches), await anext(batches)] == [[], []]
    await batches.aclose()
    await bench.finish()


@run
async def test_an_error_comes_out_where_the_events_are_read():
    scheduler, job = Scheduler(), Job("x", "a")

    def work():
        job.emit(1)
        raise MemoryError("too much")
        yield

    scheduler.submit(job, [Written(work)])
    batches = job.batches(5)
    assert await anext(batches) == [1]
    with pytest.raises(MemoryError, match="too much"):
        await anext(batches)
    after = Job("y", "a")
    scheduler.submit(after, [Written(lambda: (after.emit(n) for n in [2]))])   # the thread lives on
    assert await collected(after) == [2]
    scheduler.close(DOWN)


@run
async def test_a_waiting_job_is_cancelled_at_once_and_leaves_its_place():
    bench = Bench(capacity=2)
    one, other = bench.submit("a", "a"), bench.submit("b", "b")
    assert bench.scheduler.cancel("a")
    with pytest.raises(Cancelled):
        await collected(one)
    assert not bench.scheduler.cancel("a") and not bench.scheduler.cancel("nonsense")
    bench.submit("c", "c")
    assert await bench.finish() == ["b", "c"]
    assert await collected(other) == []


@run
async def test_a_job_at_work_sees_that_it_is_cancelled():
    scheduler, job = Scheduler(), Job("x", "a")

    def work():
        wait_for(job.cancelled)
        raise Cancelled("seen")
        yield

    scheduler.submit(job, [Written(work)])
    wait_for(lambda: scheduler.running)
    assert scheduler.stop(job, EdgeMistralError("the reason"))
    with pytest.raises(EdgeMistralError, match="the reason"):
        await collected(job)
    scheduler.close(DOWN)


@run
async def test_a_job_cancelled_between_its_answers_ends():
    bench = Bench()
    job = bench.submit("a", "a", answers=10_000)
    other = bench.submit("b", "b", answers=10_000)
    bench.go.set()
    await asyncio.to_thread(wait_for, lambda: "b" in bench.done)
    bench.scheduler.cancel("a")
    with pytest.raises(Cancelled):
        await collected(job)
    assert await collected(other) == []
    assert (await bench.finish()).count("b") == 10_000


@run
async def test_closing_refuses_and_cancels():
    bench = Bench()
    waiting = bench.submit("a", "a")
    bench.scheduler.close(DOWN, grace=60)
    with pytest.raises(Unavailable, match="shutting down"):
        await collected(waiting)
    with pytest.raises(Unavailable, match="shutting down"):
        bench.submit("b", "b")
    assert not bench.scheduler.join(0.01)
    bench.go.set()   # within its grace, what is at work ends by itself
    assert await collected(bench.first) == []
    assert await asyncio.to_thread(bench.scheduler.join, 5)


@run
async def test_what_is_at_work_is_cancelled_after_its_grace():
    scheduler, job = Scheduler(), Job("x", "a")

    def work():
        wait_for(job.cancelled)
        raise Cancelled("seen")
        yield

    scheduler.submit(job, [Written(work)])
    wait_for(lambda: scheduler.running)
    scheduler.close(DOWN, grace=0.01)
    with pytest.raises(Unavailable, match="shutting down"):
        await collected(job)
    assert await asyncio.to_thread(scheduler.join, 5)


def test_a_loop_that_is_gone_harms_nobody():
    scheduler = Scheduler()

    async def submit():
        job = Job("x", "a")

        def work():
            assert closed.wait(60)
            job.emit(1)
            yield

        scheduler.submit(job, [Written(work)])

    closed = threading.Event()
    asyncio.run(submit())
    closed.set()
    wait_for(lambda: not scheduler.running and not scheduler.waiting)

    async def again():
        job = Job("y", "a")
        scheduler.submit(job, [Written(lambda: (job.emit(n) for n in [1]))])
        return await collected(job)

    assert asyncio.run(again()) == [1]
    scheduler.close(DOWN)
    assert scheduler.join(60)
