"""What applications need of the Python API: stopping from outside, an event loop, news, politeness, and nothing left behind.

Over 400 lines: one model serves all of it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import edgemistral
from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.generate.pace import Duty
from tests.serving import fake_model, wait_for

USER = [{"role": "user", "content": "Where is it?"}]
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Athens", "Dublin", "Oslo", "Prague")
ENDLESS = {2: -100.0}      # no </s>


def asked(city):
    return [{"role": "user", "content": f"What should I see in {city}?"}]


@pytest.fixture(scope="module")
def demo():
    with edgemistral.load(edgemistral.demo_model(), threads=2) as model:
        yield model


@pytest.fixture
def slow():
    with fake_model(seconds=0.01, chunk=8) as model:
        yield model


# ---- cancelling ------------------------------------------------------------------------------------------------------

def test_cancel_from_another_thread_ends_the_answer_and_keeps_its_text(slow):
    reply = slow.chat(USER, seed=1, logit_bias=ENDLESS)
    pieces = [next(reply), next(reply)]
    threading.Thread(target=reply.cancel).start()
    pieces += reply
    assert reply.finish_reason == "cancelled" and reply.ended
    assert reply.text == "".join(pieces)
    assert list(reply) == []


def test_cancel_stops_within_one_step(slow):
    for steps, long in [(1, True), (5, False)]:      # in the middle of the prompt; in the middle of the answer
        content = "word " * 200 if long else "word"
        done = []
        reply = slow.chat([{"role": "user", "content": content}], seed=steps, logit_bias=ENDLESS)
        reader = threading.Thread(target=lambda reply=reply, done=done: done.extend(reply))
        wanted = len(slow.engine._transformer.steps) + steps
        reader.start()
        wait_for(lambda wanted=wanted: len(slow.engine._transformer.steps) >= wanted)
        reply.cancel()
        after = len(slow.engine._transformer.steps)
        reader.join(5)
        assert not reader.is_alive()
        assert len(slow.engine._transformer.steps) <= after + 1
        assert reply.finish_reason == "cancelled"


def test_after_a_cancel_the_conversation_goes_on_from_what_was_computed(demo):
    conversation = asked("Ghent")
    reply = demo.chat(conversation, 30, seed=5)
    text = next(reply) + next(reply)
    reply.cancel()
    text += "".join(reply)
    assert reply.text == text
    conversation += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    going_on = demo.chat(conversation, 12, seed=6)
    answer = "".join(going_on)
    assert going_on.usage.cached_tokens > len(demo.tokenizer.encode_chat(conversation[:1]))
    with edgemistral.load(demo.path, threads=1) as fresh:
        list(fresh.chat(conversation[:1], 30, seed=5))       # so that the first answer is spelled in the same tokens
        assert "".join(fresh.chat(conversation, 12, seed=6)) == answer


def test_cancel_before_the_first_token_and_after_the_last(slow):
    reply = slow.chat(USER, 3, seed=1)
    reply.cancel()
    assert list(reply) == [] and reply.finish_reason == "cancelled"
    assert slow.engine._transformer.steps == []
    whole = slow.chat(USER, 3, seed=1)
    text = "".join(whole)
    whole.cancel()
    assert whole.finish_reason == "length" and whole.text == text


def test_ids_can_be_cancelled_too(slow):
    generation = slow.generate([1, 5, 6], seed=1, logit_bias=ENDLESS)
    next(generation)
    generation.cancel()
    assert list(generation) == [] and generation.finish_reason == "cancelled"


def test_a_cancel_function_still_raises(slow):
    with pytest.raises(Cancelled):
        list(slow.chat(USER, cancel=lambda: True))


def test_a_cancelled_answer_is_kept_in_its_session(demo, tmp_path):
    with demo.session(tmp_path / "one.session") as session:
        reply = demo.chat(asked("Ghent"), 30, seed=5, session=session)
        text = next(reply)
        reply.cancel()
        text += "".join(reply)
        assert session.messages == [*asked("Ghent"), {"role": "assistant", "content": text}]


# ---- threads ---------------------------------------------------------------------------------------------------------

def in_threads(replies, cancelled=()):
    """All answers, each read by a thread of its own; those at `cancelled` are cancelled after a few pieces."""
    def read(number, reply):
        for count, piece in enumerate(reply):
            texts[number] += piece
            if number in cancelled and count == cancelled[number]:
                reply.cancel()

    texts = [""] * len(replies)
    threads = [threading.Thread(target=read, args=one) for one in enumerate(replies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return texts


def test_ten_threads_get_ten_unmixed_answers_whoever_cancels(demo):
    options = {"max_new_tokens": 24, "temperature": 0.8}
    with edgemistral.load(demo.path, threads=1) as alone:
        expected = ["".join(alone.chat(asked(city), seed=n, **options)) for n, city in enumerate(CITIES)]
    assert len(set(expected)) == 10

    def replies():
        return [demo.chat(asked(city), seed=n, **options) for n, city in enumerate(CITIES)]

    assert in_threads(replies()) == expected
    chance = random.Random(20)
    for _ in range(3):
        cancelled = {number: chance.randrange(8) for number in chance.sample(range(10), 5)}
        texts = in_threads(replies(), cancelled)
        for number, text in enumerate(texts):
            if number in cancelled:
                assert expected[number].startswith(text)
            else:
                assert text == expected[number]


def test_more_threads_than_a_step_has_rows():
    with fake_model(chunk=256, context=64) as model:
        model.engine._transformer.max_rows = 3
        replies = [model.generate([1, 5 + n], 4, seed=n, logit_bias=ENDLESS) for n in range(8)]
        model.engine.step(replies)
        assert {len(step) for step in model.engine._transformer.steps} == {3}
        while not all(one.done for one in replies):
            model.engine.step(replies)
    with fake_model(chunk=256, context=64) as alone:
        for n, reply in enumerate(replies):
            assert list(reply) == list(alone.generate([1, 5 + n], 4, seed=n, logit_bias=ENDLESS))


# ---- event loops -----------------------------------------------------------------------------------------------------

def test_achat_gives_the_same_answer_and_leaves_the_loop_free(slow):
    expected = "".join(slow.chat(USER, 20, seed=3))
    slow.engine._transformer.seconds = 0.05

    async def main():
        late = []

        async def tick():
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.001)
                late.append(time.monotonic() - before)

        ticking = asyncio.create_task(tick())
        reply = slow.achat(USER, 20, seed=3)
        assert reply.reply is None and reply.text == ""
        text = "".join([piece async for piece in reply])
        ticking.cancel()
        assert text == reply.text == expected and reply.finish_reason == "length"
        assert reply.usage.new_tokens == 20
        assert len(late) > 100      # a loop that waits for steps would tick twice for each of 20

    asyncio.run(main())


def test_many_at_once_in_one_loop(demo):
    async def answer(number, city):
        return "".join([piece async for piece in demo.achat(asked(city), 12, seed=number)])

    async def main():
        return await asyncio.gather(*(answer(n, city) for n, city in enumerate(CITIES)))

    assert asyncio.run(main()) == ["".join(demo.chat(asked(city), 12, seed=n)) for n, city in enumerate(CITIES)]


def test_cancelling_the_task_cancels_the_answer(slow):
    async def main():
        reply, first = slow.achat(USER, seed=1, logit_bias=ENDLESS), asyncio.Event()

        async def read():
            async for _ in reply:
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return reply

    reply = asyncio.run(main())
    computed = len(slow.engine._transformer.steps)
    assert list(reply.reply) == [] and reply.finish_reason == "cancelled"
    assert len(slow.engine._transformer.steps) <= computed + 1


def test_a_reply_can_be_closed_and_a_dropped_one_computes_nothing(slow):
    async def main():
        async for _ in slow.achat(USER, seed=1, logit_bias=ENDLESS):
            break
        computed = len(slow.engine._transformer.steps)
        await asyncio.sleep(0.1)
        assert len(slow.engine._transformer.steps) == computed
        reply = slow.achat(USER, seed=1, logit_bias=ENDLESS)
        await reply.aclose()
        assert [piece async for piece in reply] == [] and reply.finish_reason == "cancelled"

    asyncio.run(main())


def test_achat_raises_what_chat_raises(slow):
    async def pieces(*arguments, **options):
        return [piece async for piece in slow.achat(*arguments, **options)]

    with pytest.raises(BadRequest, match="temperature"):
        asyncio.run(pieces(USER, temperature=-1))
    with pytest.raises(ContextOverflow):
        asyncio.run(pieces([{"role": "user", "content": "word " * 2000}]))
    slow.close()
    with pytest.raises(EdgeMistralError, match="the model is closed"):
        asyncio.run(pieces(USER))


# ---- news, politeness, figures ---------------------------------------------------------------------------------------

def test_load_tells_how_far_it_is(tmp_path, monkeypatch):
    told = []
    with edgemistral.load(edgemistral.demo_model(), progress=lambda *news: told.append(news)) as model:
        size = model.stats.weights_bytes
        stages = [stage for stage, _, _ in told]
        assert stages == sorted(stages, reverse=True)                   # reading, then compiling
        assert told[0] == ("reading", 0, size) and ("reading", size, size) in told
        assert told[-1][0] == "compiling" and told[-1][1] == told[-1][2]
        assert model.stats.steps == 1


def test_compiling_is_told(monkeypatch):
    from edgemistral import loading
    from edgemistral.files.blob import Blob
    from edgemistral.kernels import jit

    told, before = [], []
    monkeypatch.setattr(jit, "on_compile", before.append)

    def first_step():
        jit.on_compile("forward")
        jit.on_compiled()

    with Blob.open(edgemistral.demo_model()) as blob:
        loading.told(lambda *news: told.append(news), blob, first_step)
    assert [(done, total) for stage, done, total in told if stage == "compiling"] == [(0, 0), (0, 1), (1, 1), (1, 1)]
    assert before == ["forward"] and jit.on_compile == before.append


def test_what_a_progress_raises_ends_the_load():
    with pytest.raises(ZeroDivisionError):
        edgemistral.load(edgemistral.demo_model(), progress=lambda *_: 1 / 0)


def test_stats(demo):
    before = demo.stats
    reply = demo.chat([{"role": "user", "content": "Tell me of a place that nobody has asked for."}], 8, seed=1)
    list(reply)
    after = demo.stats
    assert after.prompt_tokens - before.prompt_tokens == reply.usage.prompt_tokens - reply.usage.cached_tokens
    assert after.decoded_tokens >= before.decoded_tokens + reply.usage.new_tokens - 1
    assert after.steps > before.steps and after.compute_seconds > before.compute_seconds
    assert after.threads == 2 and after.context == demo.context and after.duty == 1
    assert after.weights_bytes == demo.path.stat().st_size and after.kv_bytes == demo.kv_bytes > 0
    assert after.tokens_per_second > 0 and after.load_seconds > 0


def test_duty_rests_and_changes_no_bit(slow):
    expected = "".join(slow.chat(USER, 10, seed=3))
    with fake_model(seconds=0.01, chunk=8) as model:
        model.duty = 0.25
        began = time.monotonic()
        assert "".join(model.chat(USER, 10, seed=3)) == expected
        stats = model.stats
        assert stats.compute_seconds < 0.5 * (time.monotonic() - began)
        assert stats.duty == 0.25
        model.duty = 1
        assert model.engine.duty.left() <= 0


def test_a_rest_holds_up_nobody(slow):
    slow.engine._transformer.seconds = 0.05
    slow.duty = 0.01                   # five seconds of rest after each step
    reply = slow.generate([1, 5, 6], seed=1, logit_bias=ENDLESS)
    next(reply)
    began = time.monotonic()
    timer = threading.Timer(0.1, reply.cancel)
    timer.start()
    assert list(reply) == []
    timer.join()
    slow.close()
    assert time.monotonic() - began < 4      # not one rest


@pytest.mark.parametrize("duty", [0, -1, 1.5, "half", True, float("nan")])
def test_a_duty_that_is_none(duty, slow):
    with pytest.raises(BadRequest, match="duty is"):
        slow.duty = duty
    with pytest.raises(BadRequest, match="duty is"):
        edgemistral.load(edgemistral.demo_model(), duty=duty)


def test_at_a_low_duty_steps_are_short_and_every_row_has_its_turn():
    duty = Duty()
    assert duty.most(256) == 256
    duty.share = 0.5
    assert duty.most(256) == 128
    duty.share = 0.01
    assert duty.most(256) == 64 and duty.most(8) == 8


def test_nothing_is_printed_and_what_is_logged_can_be_had():
    code = (
        "import logging, sys, edgemistral\n"
        "if sys.argv[1:]: logging.basicConfig(level=logging.DEBUG, format='%(name)s %(levelname)s %(message)s')\n"
        "with edgemistral.load(edgemistral.demo_model(), progress=lambda *_: None) as model:\n"
        "    list(model.chat([{'role': 'user', 'content': 'Hello'}], 2))\n"
    )
    def run(*arguments):
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)

    silent, logged = run(), run("log")
    assert (silent.stdout, silent.stderr) == ("", "")
    assert logged.stdout == "" and "edgemistral INFO " in logged.stderr and ": loaded in " in logged.stderr


def test_the_log_names_the_file(caplog):
    with caplog.at_level(logging.INFO, "edgemistral"), edgemistral.load(edgemistral.demo_model()) as model:
        assert f"{model.path}: loaded in" in caplog.text


# ---- nothing left behind ---------------------------------------------------------------------------------------------

def taken():
    """Resident ordinary memory in bytes, open files, threads, mappings of the blob."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    mapped = Path("/proc/self/maps").read_text().count("demo.safetensors")
    return memory, len(os.listdir("/proc/self/fd")), threading.active_count(), mapped  # noqa: PTH208


def load_and_close(rounds, tmp_path):
    for n in range(rounds):
        with edgemistral.load(edgemistral.demo_model(), threads=2, kv_store=tmp_path / "kv") as model:
            reply = model.chat(asked(CITIES[n % 10]), 3, seed=n)
            next(reply)
            with model.session(tmp_path / "one.session") as session:
                list(model.chat(USER, 1, session=session))
            asyncio.run(first_of(model.achat(USER, 2)))
    return reply


async def first_of(reply):
    return await anext(reply)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_loading_and_closing_leaves_nothing(rounds, tmp_path):
    load_and_close(12, tmp_path)
    memory, *others = taken()
    kept = load_and_close(rounds, tmp_path)      # an answer that somebody still holds keeps no model alive
    after, *others_after = taken()
    assert others_after == others
    assert after - memory < 4 << 20
    with pytest.raises(EdgeMistralError, match="closed"):
        next(kept)
