"""The chat: its commands over a scripted model, and the real program in a real terminal.

Over 400 lines: one terminal and one scripted model serve all of it.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

import edgemistral
from edgemistral.cli import repl
from edgemistral.cli.repl import Chat
from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.terminal import cells
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.checkpoints import babbler
from tests.fake import FakeTransformer, tiny_config

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(TOKENIZER.read_bytes())


@pytest.fixture
def make_chat(tokenizer):
    def make(context=512, chunk=64, max_new_tokens=4, **options):
        config = tiny_config(vocab_size=tokenizer.vocab_size, context=context, eos_id=tokenizer.eos_id)
        model = Model(Engine(FakeTransformer(config, chunk=chunk)), tokenizer)
        return Chat(model, max_new_tokens=max_new_tokens, **{"seed": 1, **options})
    return make


def test_a_conversation_keeps_its_turns_and_computes_only_new_tokens(make_chat, capsys):
    chat = make_chat()
    chat.take("Hello")
    chat.take("And then?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert capsys.readouterr().out == "".join(m["content"] + "\n" for m in chat.messages if m["role"] == "assistant")
    assert chat._last.usage.cached_tokens > 8


def test_regen_answers_again_with_another_seed(make_chat):
    chat = make_chat()
    chat.take("Hello")
    before = chat.messages
    chat.take("/regen")
    assert chat.messages[0] == before[0] and len(chat.messages) == 2
    assert chat.messages[1] != before[1]
    chat.take("/clear")
    assert chat.messages == []


def test_regen_without_a_message_says_so(make_chat, capsys):
    make_chat().take("/regen")
    assert capsys.readouterr().err == "error: there is no message to answer yet\n"


def test_the_system_text_is_part_of_the_prompt(make_chat, tokenizer, capsys):
    chat = make_chat(system="Be kind.")
    chat.take("Hello")
    sent = chat._model.engine.tokens.tolist()
    prompt = tokenizer.encode_chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    assert sent[: len(prompt)] == prompt
    chat.take("/system")
    assert capsys.readouterr().out.endswith("Be kind.\n")
    chat.take("/system -")
    assert chat.system == ""


def test_settings_are_shown_changed_and_checked(make_chat, capsys):
    chat = make_chat()
    for line in ("/set temperature 0.2", "/set top_k 5", "/set seed none", "/set max_new_tokens 7"):
        chat.take(line)
    assert (chat.settings["temperature"], chat.settings["top_k"], chat.settings["seed"]) == (0.2, 5, None)
    chat.take("/set")
    assert re.search(r"^max_new_tokens +7$", capsys.readouterr().out, re.M)
    before = dict(chat.settings)
    for line in ("/set top_p 2", "/set top_k many", "/set warmth 1", "/set max_new_tokens 0", "/set temperature"):
        chat.take(line)
        assert capsys.readouterr().err.startswith("error: ")
    assert chat.settings == before


def test_an_unknown_command_says_so(make_chat, capsys):
    chat = make_chat()
    chat.take("/usr/bin is what?")
    assert "unknown command /usr/bin: /help lists them" in capsys.readouterr().err
    assert chat.messages == []


@pytest.mark.parametrize("line", [
    "exit", "quit", "/bye", "/quit", "/q", "/exit", "EXIT", "Quit ", "exit()", "quit()", ":q", "/BYE", "/exit now"])
def test_the_words_that_people_leave_with(make_chat, line):
    chat = make_chat()
    chat.take(line)
    assert chat.over and chat.messages == []


@pytest.mark.parametrize("line", ["/?", "/help", "/h", "?", "help", "/HELP", "/help set"])
def test_the_words_that_people_ask_for_help_with(make_chat, capsys, line):
    make_chat().take(line)
    assert "/system [TEXT]" in capsys.readouterr().out


@pytest.mark.parametrize("line", [" exit", "exit the house", "How do I quit?", "help me"])
def test_words_inside_a_message_are_no_command(make_chat, line):
    chat = make_chat()
    chat.take(line)
    assert not chat.over and chat.messages[0]["content"] == line.strip()


def test_a_command_with_a_slip_is_recognised(make_chat, capsys):
    make_chat().take("/stat")
    assert capsys.readouterr().err.startswith("unknown command /stat: did you mean /stats? ")


@pytest.mark.parametrize("line", [
    "/set logit_bias 3", "/set logit_bias none", "/set grammar x", "/set top_logprobs 3", "/set temperature nan",
    "/set seed " + "9" * 5000, "/set top_k 1e400", "/set = =", "/set temperature [1]", "/set max_new_tokens True",
    "/set temperature {}", "/load ~nobody-of-that-name/x", "/load \0", "/save \0", "/load /dev/zero", "/load .",
    "/save .", "/save /dev/full/x", "/load \ud800", "/save " + "x" * 5000,
])
def test_no_command_ends_the_chat_or_leaves_it_changed(make_chat, capsys, line):
    chat = make_chat()
    before = dict(chat.settings)
    chat.take(line)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "bug" not in err, err
    assert (chat.over, chat.messages, chat.settings) == (False, [], before)


@pytest.mark.parametrize("name", ["help", "clear", "system", "regen", "set", "stats", "save", "load", "exit"])
def test_an_unforeseen_error_in_a_command_is_one_line(make_chat, capsys, monkeypatch, name):
    def fail(self, argument):
        raise ZeroDivisionError("of a kind\nnobody thought of")

    monkeypatch.setattr(Chat, f"do_{name}", fail)
    chat = make_chat()
    chat.take(f"/{name}")
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: of a kind nobody thought of")
    chat.take("Hello")
    assert len(chat.messages) == 2


def test_settings_that_are_no_numbers_stay_as_they_were_given(make_chat):
    chat = make_chat(logit_bias={400: -100.0})
    chat.take("/set temperature = 0")
    chat.take("Hello")
    assert chat.settings["temperature"] == 0 and "logit_bias" not in chat.settings and len(chat.messages) == 2


def test_help_names_every_command(make_chat, capsys):
    make_chat().take("/help")
    out = capsys.readouterr().out
    for command in ("/help", "/clear", "/system", "/regen", "/set", "/stats", "/save", "/load", "/exit"):
        assert f"{command} " in out


def test_a_message_over_the_context_is_refused_and_the_conversation_survives(make_chat, capsys):
    chat = make_chat(context=64)
    chat.take("Hello")
    before = list(chat.messages)
    chat.take("word " * 100)
    assert re.search(r"error: \d+ tokens are \d+ more than the context of 64 holds: shorten", capsys.readouterr().err)
    assert chat.messages == before
    chat.take("Hi")
    assert len(chat.messages) == 4


def test_a_full_context_is_said(make_chat, capsys):
    chat = make_chat(context=20, max_new_tokens=None)
    chat.take("Hello")
    assert "(the context of 20 tokens is full: /clear starts again)" in capsys.readouterr().err
    assert chat.messages[-1]["content"]


def test_stats(make_chat, capsys):
    chat = make_chat()
    chat.take("/stats")
    assert "context: 0 of 512 tokens" in capsys.readouterr().out
    chat.take("Hello")
    chat.take("/stats")
    assert re.search(r"4 new\nspeed: .+\ncontext: \d+ of 512 tokens\n$", capsys.readouterr().out)


def test_save_and_load(make_chat, tmp_path, capsys):
    chat = make_chat(system="Be kind.")
    chat.take("Wo ist das Café? 🙂")
    file = tmp_path / "a conversation.json"
    chat.take(f"/save {file}")
    assert list(tmp_path.iterdir()) == [file]
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert saved[0] == {"role": "system", "content": "Be kind."} and saved[1:] == chat.messages
    other = make_chat()
    other.take(f"/load {file}")
    assert (other.system, other.messages) == ("Be kind.", chat.messages)
    assert "(2 messages from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"messages": 1}', '{"messages": [1]}', '{"messages": [{"role": "robot"}]}', "\ud800",
                '{"messages": [{"role": "user", "content": null}]}', '{"messages": [{"role": "user", "content": ["x"]}]}',
                '{"messages": [{"role": ["user"], "content": "x"}]}', '{"messages": [{"role": "tool", "content": "x"}]}']
)
def test_a_bad_file_is_not_loaded(make_chat, tmp_path, capsys, content):
    chat = make_chat()
    chat.take("Hello")
    before = list(chat.messages)
    file = tmp_path / "chat.json"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    capsys.readouterr()
    missing = tmp_path / "missing" / "chat.json"
    for line in (f"/load {file}", f"/load {missing}", "/load", "/save", f"/save {missing}"):
        chat.take(line)
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert chat.messages == before


class InterruptingTransformer(FakeTransformer):
    """Sends this process Ctrl-C in the middle of one step."""

    interrupt_at = None

    def step(self, rows):
        if len(self.calls) == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(rows)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send Ctrl-C there")
@pytest.mark.parametrize(("at", "kept"), [(0, False), (1, False), (4, True)])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(tokenizer, capsys, at, kept):
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=512, eos_id=tokenizer.eos_id)
    transformer = InterruptingTransformer(config, chunk=4)
    transformer.interrupt_at = at
    chat = Chat(Model(Engine(transformer), tokenizer), seed=1)
    chat.take("Hello")   # a prompt of three chunks
    err = capsys.readouterr().err
    if kept:
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] and chat.messages[1]["content"]
        assert err == "(stopped)\n"
    else:
        assert chat.messages == [] and "the conversation is unchanged" in err
    chat.settings["max_new_tokens"] = 3
    chat.take("Go on")
    assert chat.messages[-1]["role"] == "assistant"


def run_plain(monkeypatch, chat_model, text, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    repl.chat(chat_model, max_new_tokens=3, seed=1, **options)


def test_without_a_terminal_every_line_is_a_turn(monkeypatch, make_chat, capsys):
    model = make_chat()._model
    run_plain(monkeypatch, model, "one\\\ntwo\n\n/stats\n/exit\nnever\n")
    captured = capsys.readouterr()
    assert "context: " in captured.out and captured.err == "(ended after 3 tokens: /set max_new_tokens)\n"
    expected = model.tokenizer.encode_chat([{"role": "user", "content": "one\ntwo"}])
    assert model.engine.tokens.tolist()[: len(expected)] == expected


def test_a_space_lets_a_message_begin_with_a_slash(monkeypatch, make_chat):
    model = make_chat()._model
    run_plain(monkeypatch, model, " /usr/bin is what?\n")
    expected = model.tokenizer.encode_chat([{"role": "user", "content": "/usr/bin is what?"}])
    assert model.engine.tokens.tolist()[: len(expected)] == expected


def test_the_end_of_input_leaves(monkeypatch, make_chat, capsys):
    run_plain(monkeypatch, make_chat()._model, "one")
    assert capsys.readouterr().out.count("\n") == 1


PROMPT = r"\x1b\[\?2004h"   # the line editor starts by asking for bracketed paste
pexpect = pytest.importorskip("pexpect") if sys.platform != "win32" else None


class Terminal:
    """The real program in a terminal of its own."""

    def __init__(self, model, env, size=(30, 100)):
        arguments = ["-m", "edgemistral", "run", model, "--max-new-tokens", "4", "--threads", "1", "--seed", "1"]
        self.child = pexpect.spawn(sys.executable, arguments, env=env, encoding="utf-8", timeout=30, dimensions=size)
        self.sees(r"/help\s+lists\s+the\s+commands")

    def sees(self, pattern):
        self.child.expect(pattern)

    def gets(self, keys):
        """Types once the line editor listens: what comes before it belongs to the terminal's own line discipline."""
        self.sees(PROMPT)
        self.child.send(keys)

    def leaves(self, keys="/exit\r"):
        self.gets(keys)
        self.sees(pexpect.EOF)
        self.child.wait()
        return self.child.exitstatus


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose answers do not end; no terminal waits for its kernels."""
    blob = babbler(tmp_path_factory.mktemp("babbler"))
    with edgemistral.load(blob) as model:
        model.engine.prefill([1])
    return str(blob)


@pytest.fixture
def terminal(tmp_path, endless):
    env = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    terminal = Terminal(endless, env)
    yield terminal
    terminal.child.close(force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
class TestInATerminal:
    def test_an_answer_and_its_numbers(self, terminal):
        terminal.gets("Hello\r")
        terminal.sees(r"\(ended after 4 tokens")
        terminal.gets("/stats\r")
        terminal.sees(r"context: \d+ of \d+ tokens")
        assert terminal.leaves() == 0

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, terminal):
        terminal.gets("/set max_new_tokens none\r")
        terminal.gets("Hello\r")
        terminal.sees(r"Hello[^\n]*\n[^\n]*[a-z]{3}")   # the line that was typed, then the beginning of an answer
        terminal.child.send("\x03")
        terminal.sees(r"\(stopped\)")
        terminal.gets("/stats\r")
        terminal.sees("context: ")
        assert terminal.leaves("\x04") == 0

    def test_ctrl_c_at_the_prompt_clears_the_line_then_hints(self, terminal):
        terminal.gets("/exi\x03/nope\r")
        terminal.sees("unknown command /nope")
        terminal.gets("\x03")
        terminal.sees(r"Ctrl-D or /exit leaves")
        assert terminal.leaves() == 0

    def test_several_lines_and_history(self, terminal, tmp_path):
        terminal.gets("/system one\\\rtwo\x1b\rthree\r")
        terminal.sees("next answer")
        terminal.gets("/system\r")
        terminal.sees("one\r\ntwo\r\nthree")
        terminal.gets("\x1b[A\r")   # up: the line before, again
        terminal.sees("one\r\ntwo\r\nthree")
        assert terminal.leaves() == 0
        [history] = tmp_path.rglob("history")
        assert "+two" in history.read_text(encoding="utf-8")
        assert history.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize("word", ["exit", "quit", "/bye"])
    def test_leaving_as_people_do(self, terminal, word):
        assert terminal.leaves(f"{word}\r") == 0

    def test_no_command_ends_it(self, terminal):
        for line, error in (("/set logit_bias 3", "no setting logit_bias"), ("/load /", "must be a file"), ("/?", "/regen")):
            terminal.gets(f"{line}\r")
            terminal.sees(error)
        assert terminal.leaves() == 0

    def test_there_is_a_sign_of_life_before_the_first_word(self, terminal):
        terminal.gets("Hello\r")
        terminal.sees(r"thinking \.\.\.\r +\r[^\r\n]*[a-z]")   # and nothing of it stays
        terminal.gets("word " * 400 + "\r")
        terminal.sees(r"reading the prompt: \d+ of \d+ tokens")
        assert terminal.leaves() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
def test_help_is_wrapped_at_words_in_a_narrow_window(tmp_path, endless):
    env = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    terminal = Terminal(endless, env, size=(60, 30))
    terminal.gets("/help\r")
    terminal.sees(r"/help\r\n    this list\r\n(.*)Ctrl-C")
    lines = [line.rstrip() for line in terminal.child.match[1].replace("\r\n", "\n").split("\n")]
    assert len(lines) > 16 and all(len(line) <= 30 for line in lines), lines
    assert "such as /set temperature 0.3;" in " ".join(" ".join(lines).split())
    assert terminal.leaves() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
@pytest.mark.parametrize("width", [24, 40, 61])
def test_an_answer_is_wrapped_at_words_in_a_window_of_any_width(tmp_path, endless, width):
    env = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    arguments = ["-m", "edgemistral", "run", endless, "Hello", "--max-new-tokens", "60", "--threads", "1", "--seed", "1"]

    def answered(size):
        child = pexpect.spawn(sys.executable, arguments, env=env, encoding="utf-8", timeout=30, dimensions=size)
        child.expect(pexpect.EOF)
        child.wait()
        return child.before.replace("\r\n", "\n").rpartition("\r")[2]   # what follows the status line

    wide, narrow = answered((30, 10_000)), answered((30, width))
    assert narrow.split() == wide.split() and narrow.count("\n") > wide.count("\n")
    for line in narrow.split("\n"):
        first = line.split(" ", 1)[0]      # may be wider than the window: the terminal itself breaks it
        assert cells(line.rstrip()) - max(cells(first) - 1, 0) // width * width <= width, line
