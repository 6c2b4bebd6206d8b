"""Sessions of the demo model: restarts, what the command line says, and answers whose text comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgemistral
from edgemistral.cli.repl import Chat
from edgemistral.cli.sessions import describe_session
from edgemistral.demo import demo_model
from edgemistral.errors import BadSession, EdgeMistralError
from edgemistral.files.records import KV_VERSION
from edgemistral.text.written import WrittenTexts
from tests.serving import fake_model

PARIS = [{"role": "user", "content": "What should I see in Paris?"}]


@pytest.fixture(scope="module")
def model():
    with edgemistral.load(demo_model(), threads=1) as model:
        yield model


def ask(model, messages, session=None, n=40, **options):
    reply = model.chat(messages, n, temperature=0, session=session, **options)
    return "".join(reply), reply


def test_a_restart_finds_everything_that_was_said(tmp_path, model):
    path = tmp_path / "a.session"
    with edgemistral.load(demo_model(), threads=1) as first, first.session(path) as session:
        answer, _ = ask(first, PARIS, session)
        asked = [*session.messages, {"role": "user", "content": "And in winter?"}]
        ask(first, asked, session)
        assert session.messages[:2] == [*PARIS, {"role": "assistant", "content": answer}]
        messages, tokens = session.messages, session.tokens
    with edgemistral.load(demo_model(), threads=1) as second, second.session(path) as session:
        assert session.messages == messages and session.tokens == tokens and session.notice == ""
        again = [*session.messages, {"role": "user", "content": "And in Rome?"}]
        text, reply = ask(second, again, session)
        assert reply.usage.cached_tokens == tokens
    assert text == ask(model, again)[0]


def test_without_a_session_nothing_is_written(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    ask(model, PARIS)
    assert list(tmp_path.iterdir()) == []


def test_a_session_of_another_model_width_or_an_open_one_is_refused(tmp_path, model):
    path = tmp_path / "a.session"
    with model.session(path) as session:
        ask(model, PARIS, session)
        with pytest.raises(BadSession, match="in use"):
            model.session(path)
    with pytest.raises(EdgeMistralError, match="closed"):
        ask(model, PARIS, session)
    with edgemistral.load(demo_model(), threads=1, kv_bits=16) as other, pytest.raises(BadSession, match="--kv-bits 16"):
        other.session(path)
    with model.session(path) as session:
        session.clear()
        assert session.tokens == 0 and session.messages == []
    with model.session(path) as session:
        assert session.tokens == 0 and session.messages == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_file_that_may_not_grow_is_a_clear_error_and_a_valid_session(tmp_path):
    path = tmp_path / "a.session"
    code = """if True:
        import resource, sys
        import edgemistral
        from edgemistral.demo import demo_model
        with edgemistral.load(demo_model(), threads=1) as model, model.session(sys.argv[1]) as session:
            "".join(model.chat([{"role": "user", "content": "Paris? " * 40}], 20, temperature=0, session=session))
            before = session.tokens
            resource.setrlimit(resource.RLIMIT_FSIZE, (session.path.stat().st_size + 1000,) * 2)
            try:
                "".join(model.chat([{"role": "user", "content": "Paris? " * 200}], 20, temperature=0, session=session))
            except edgemistral.EdgeMistralError as error:
                print(error)
            print("".join(model.chat([{"role": "user", "content": "Hello"}], 5, temperature=0)))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{path}: cannot be written: File too large; it keeps what it held before", done.stderr
    assert lines[1] and not done.returncode
    with edgemistral.load(demo_model(), threads=1) as model, model.session(path) as session:
        assert session.tokens >= 80 and not session.notice


# ---- answers whose text comes back ------------------------------------------------------------------------------------

def test_an_answer_is_found_by_the_ids_it_was_written_in(tmp_path):
    with fake_model() as model:                              # its tokens are random, and hardly ever the tokenizer's choice
        tokenizer, path = model.tokenizer, tmp_path / "a.session"
        with model.session(path) as session:
            reply = model.chat(PARIS, 30, temperature=0, session=session)
            text = "".join(reply)
            assert tokenizer.encode(text) != reply.token_ids and tokenizer.decode(reply.token_ids) == text
            follow = [*PARIS, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]
            second = model.chat(follow, 3, temperature=0)
            "".join(second)
            assert second.usage.cached_tokens >= reply.usage.prompt_tokens + len(reply.token_ids) - 1
    with fake_model() as model, model.session(path) as session:          # and after a restart
        second = model.chat(follow, 3, temperature=0)
        "".join(second)
        assert second.usage.cached_tokens >= reply.usage.prompt_tokens + len(reply.token_ids) - 1


def test_an_answer_that_a_stop_string_ended_is_found_up_to_there():
    with fake_model() as model:
        whole = "".join(model.chat(PARIS, 30, temperature=0))
        reply = model.chat(PARIS, 30, temperature=0, stop=whole[20:24])
        text = "".join(reply)
        assert reply.finish_reason == "stop" and whole.startswith(text)
        second = model.chat(
            [*PARIS, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}], 3, temperature=0
        )
        "".join(second)
        assert second.usage.cached_tokens >= reply.usage.prompt_tokens + len(reply.ids_of_text) - 1


def test_only_what_spells_the_text_and_differs_is_kept(model, monkeypatch):
    tokenizer = model.tokenizer
    written = WrittenTexts(tokenizer)
    own = tokenizer.encode("Paris is large.")
    assert not written.remember("Paris is large.", own)
    assert not written.remember("Paris is small.", [*own, 5]) and not written.remember("", [])
    spelled = [tokenizer.encode(letter)[-1] for letter in "Par"]
    assert written.remember(tokenizer.decode(spelled), spelled) or spelled == tokenizer.encode(tokenizer.decode(spelled))
    monkeypatch.setattr("edgemistral.text.written.MOST_IDS", 10)
    kept = WrittenTexts(tokenizer)
    for n in range(200):
        ids = [token for letter in f"x{n}y" for token in tokenizer.encode(letter)[-1:]]
        kept.remember(tokenizer.decode(ids), ids)
    assert kept._size <= 10 and len(kept) <= 10


# ---- overflow ---------------------------------------------------------------------------------------------------------

def long_chat(turns):
    messages = [{"role": "system", "content": "Be brief."}]
    for n in range(turns):
        messages += [{"role": "user", "content": f"question {n} " * 8}, {"role": "assistant", "content": f"answer {n} " * 8}]
    return [*messages, {"role": "user", "content": "And the last?"}]


def test_a_conversation_over_the_context_is_refused_by_default():
    with fake_model(context=512) as model:
        with pytest.raises(edgemistral.ContextOverflow, match=r"\d+ tokens are \d+ more than the context of 512") as caught:
            model.chat(long_chat(20))
        assert caught.value.over == caught.value.n_tokens - 512
        with pytest.raises(edgemistral.BadRequest, match="on_overflow is 'no'") as wrong:
            model.chat(PARIS, on_overflow="no")
        assert wrong.value.field == "on_overflow"


def test_the_oldest_turns_go_and_never_the_system_text():
    with fake_model(context=512) as model:
        messages = long_chat(20)
        reply = model.chat(messages, 8, temperature=0, on_overflow="drop-oldest")
        assert reply.dropped and reply.dropped == tuple(range(1, 1 + len(reply.dropped))) and len(reply.dropped) % 2 == 0
        kept = [message for n, message in enumerate(messages) if n not in reply.dropped]
        assert kept[0]["role"] == "system" and kept[-1] == messages[-1]
        assert "".join(reply) == "".join(model.chat(kept, 8, temperature=0))
        assert reply.usage.prompt_tokens == len(model.tokenizer.encode_chat(kept)) <= 512 - 8
        assert model.chat(long_chat(2), 8, on_overflow="drop-oldest").dropped == ()


def test_later_turns_go_on_with_what_was_kept():
    with fake_model(context=512) as model:
        computed, prompts = [], []
        for turns in range(30):
            reply = model.chat(long_chat(turns), 8, temperature=0, on_overflow="drop-oldest")
            "".join(reply)
            computed.append(reply.usage.prompt_tokens - reply.usage.cached_tokens)
            prompts.append(reply.usage.prompt_tokens)
        assert max(prompts) <= 504 and min(prompts[8:]) > 100
        assert sum(n > 120 for n in computed) <= 10          # most turns compute their own tokens only


def test_a_last_turn_that_is_too_long_alone_is_an_error_all_the_same():
    with fake_model(context=512) as model:
        too_long = {"role": "user", "content": "word " * 900}
        for messages in ([too_long], [*long_chat(3)[:-1], too_long]):
            with pytest.raises(edgemistral.ContextOverflow):
                model.chat(messages, on_overflow="drop-oldest")


# ---- the command line -------------------------------------------------------------------------------------------------

def command(*arguments, text=""):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "edgemistral", *map(str, arguments)], input=text, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_run_and_sessions(tmp_path):
    path = tmp_path / "a.session"
    options = ["--greedy", "--session", path, "--max-new-tokens", 20]
    code, first, _ = command("run", "demo", "What should I see in Paris?", *options)
    assert code == 0 and first
    code, out, err = command(
        "run", "demo", "--greedy", "--session", path, text="And in winter?\n/stats\n/save " + str(tmp_path / "a.json") + "\n"
    )
    saved = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert code == 0 and "(continuing with 2 messages" in err and len(saved) == 4 and saved[1]["content"] == first[:-1]
    assert "of them from the cache" in out
    (tmp_path / "other.txt").write_text("not ours")
    code, out, _ = command("sessions", tmp_path, "--json")
    listed = json.loads(out)
    assert code == 0 and [line["file"] for line in listed] == [str(path)] and listed[0]["tokens"] > 40
    code, out, _ = command("sessions", path, "--verify")
    assert code == 0 and str(path) in out
    data = bytearray(path.read_bytes())
    data[-(1 << 16) + 50] ^= 4
    path.write_bytes(data)
    code, out, _ = command("sessions", path, "--verify")
    assert code == 1 and "the rest is damaged" in out
    code, _, err = command("run", "demo", "And in Rome?", "--greedy", "--session", path)
    assert code == 0 and "note: " in err and "continues from" in err
    for arguments in (["--raw", "x"], ["--json", "-"]):
        code, _, err = command("run", "demo", *arguments, "--session", path)
        assert code == 2 and len(err.splitlines()) == 1
    code, _, err = command("sessions", tmp_path / "other.txt", "--delete")
    assert code == 2 and "not a session file" in err and (tmp_path / "other.txt").exists()
    assert command("sessions", tmp_path, "--delete")[0] == 0 and not path.exists()
    assert command("sessions", tmp_path / "missing")[0] == 2


def test_a_session_of_another_edgemistral_is_listed_as_such(tmp_path, monkeypatch, model):
    path = tmp_path / "a.session"
    with monkeypatch.context() as patch:
        patch.setitem(model._binding, "kv_version", KV_VERSION - 1)
        with model.session(path) as session:
            ask(model, PARIS, session)
    before = path.read_bytes()
    for verify in (False, True):
        line = describe_session(path, verify)
        assert line["state"] == "unusable" and line["tokens"] > 10
        assert f"({KV_VERSION - 1}; this one has {KV_VERSION}): delete it to start again" in line["note"]
    with pytest.raises(BadSession, match="delete it to start again"):
        model.session(path)
    assert path.read_bytes() == before


def test_a_4_bit_session_goes_on_from_the_last_whole_block(tmp_path):
    path = tmp_path / "a.session"
    with edgemistral.load(demo_model(), threads=1, kv_bits=4) as model:
        with model.session(path) as session:
            ask(model, PARIS, session, n=80)
            ids, asked = session.ids, [*session.messages, {"role": "user", "content": "And in winter?"}]
        assert len(ids) > 64 and len(ids) % 64
        expected, _ = ask(model, asked)
    with edgemistral.load(demo_model(), threads=1, kv_bits=4) as model, model.session(path) as session:
        assert session.ids.tolist() == ids[: len(ids) // 64 * 64].tolist() and session.notice == ""
        answer, reply = ask(model, asked, session)
        assert answer == expected and reply.usage.cached_tokens == len(ids) // 64 * 64


class TestInTheChat:
    """/sessions and /resume: one folder of sessions, one of them at a time."""

    def test_one_session_after_another(self, tmp_path, model, capsys):
        paris, rome = tmp_path / "paris.session", tmp_path / "rome.session"
        for path, text in ((rome, "What should I see in Rome?"), (paris, "What should I see in Paris?")):
            with model.session(path) as session:
                ask(model, [{"role": "user", "content": text}], session)
        chat = Chat(model, max_new_tokens=4, session=model.session(paris), temperature=0)
        chat.take("/sessions")
        listed = capsys.readouterr().out
        assert "paris.session" in listed and "rome.session" in listed and "in use" not in listed.splitlines()[1]
        before = chat.messages
        for wrong in ("/resume", "/resume nothing.session", f"/resume {tmp_path}", f"/resume {__file__}"):
            chat.take(wrong)
            assert capsys.readouterr().err.startswith("error: ")
        assert chat.messages == before
        chat.take("/resume rome.session")       # beside the present one
        assert "Rome" in chat.messages[0]["content"] and "2 messages" in capsys.readouterr().err
        chat.take("And in winter?")
        assert chat._last.usage.cached_tokens > 8
        chat.take("/resume rome.session")
        assert "the current conversation" in capsys.readouterr().err
        model.session(paris).close()            # it was let go of
        chat.close()
        with model.session(rome) as session:
            assert session.messages == chat.messages and len(session.messages) == 4

    def test_a_chat_without_a_session_moves_into_one(self, tmp_path, model, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        chat = Chat(model, max_new_tokens=4, temperature=0)
        chat.take("/sessions")
        assert "no sessions" in capsys.readouterr().err
        with model.session(tmp_path / "a b.session") as session:
            ask(model, PARIS, session, n=4)
        chat.take('/resume "a b.session"')
        assert chat.messages[0] == PARIS[0]
        chat.close()
