"""The chat in the terminal: a conversation, its /commands, and two ways to read a line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgemistral.errors import BadInput, BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.files import strict_json
from edgemistral.generate.sampler import SamplingParams
from edgemistral.model import Model, Reply
from edgemistral.terminal import StatusLine, printable, stoppable

Message = dict[str, str]


def chat(model: Model, system: str | None = None, max_new_tokens: int | None = None, **sampling: Any) -> None:
    """Talk until /exit or the end of the input. In a terminal with line editing and history, else line by line.

    Answers and what commands print go to standard output, everything else to standard error.
    """
    conversation = Chat(model, system, max_new_tokens, **sampling)
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from edgemistral.cli.line_editor import line_editor

        read: Callable[[], str] = line_editor(conversation.commands())
        name = model.path.stem if model.path else "chat"
        _say(f"{name}, context {model.context} tokens. /help lists the commands, Ctrl-D leaves.")
    else:
        read = _plain_line
    while not conversation.over:
        try:
            text = read()
        except KeyboardInterrupt:
            _say("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            break
        if text.strip():
            conversation.take(text)


class Chat:
    """One conversation and how it is answered. `over` is True after /exit.

    Whatever goes wrong with a message is said, and the conversation is as it was before.
    """

    def __init__(self, model: Model, system: str | None = None, max_new_tokens: int | None = None, **sampling: Any):
        self.over = False
        self.messages: list[Message] = []   # user and assistant in turn
        self.system = system or ""
        self.settings = {"max_new_tokens": max_new_tokens, **asdict(model.sampling(**sampling))}
        _check_settings(self.settings)
        self._model = model
        self._last: Reply | None = None

    def take(self, text: str) -> None:
        """One line of the user's: a /command, or a message to answer."""
        try:
            if text.startswith("/"):
                self._command(text)
            else:
                self._answer([*self.messages, {"role": "user", "content": text.strip()}], self.settings)
        except EdgeMistralError as error:
            _say(f"error: {error}")

    @classmethod
    def commands(cls) -> list[str]:
        """The commands, each with its slash."""
        return [f"/{name.removeprefix('do_')}" for name in vars(cls) if name.startswith("do_")]

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in self.commands():
            _say(f"unknown command {name}: /help lists them (begin a message with a space to start it with a slash)")
        else:
            getattr(self, f"do_{name[1:]}")(argument.strip())

    def do_help(self, _: str) -> None:
        """/help                     this list"""
        for name in self.commands():
            print(getattr(self, f"do_{name[1:]}").__doc__)
        print("A line that ends in a backslash, or Alt-Enter, goes on in the next. Ctrl-C stops an answer.")

    def do_clear(self, _: str) -> None:
        """/clear                    forget the conversation; system text and settings stay"""
        self.messages = []
        _say("(a new conversation)")

    def do_system(self, text: str) -> None:
        """/system [TEXT]            show or set the system text; /system - removes it"""
        if not text:
            print(self.system or "(no system text)")
            return
        self.system = "" if text == "-" else text
        _say("(from the next answer on)")

    def do_regen(self, _: str) -> None:
        """/regen                    answer the last message again, with a new seed"""
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadInput("there is no message to answer yet")
        if self.settings["temperature"] == 0:
            _say("(at temperature 0 the answer stays the same)")
        self._answer(messages, {**self.settings, "seed": None})

    def do_set(self, argument: str) -> None:
        """/set [NAME VALUE]         show the settings or change one, such as /set temperature 0.3; none is no value"""
        if not argument:
            for name, value in self.settings.items():
                print(f"{name:20}{'none' if value is None else value}")
            return
        name, _, text = argument.partition(" ")
        if name not in self.settings:
            raise BadRequest(f"there is no setting {name}: {', '.join(self.settings)}", name)
        settings = {**self.settings, name: _number(text.strip())}
        _check_settings(settings)
        self.settings = settings

    def do_stats(self, _: str) -> None:
        """/stats                    the last answer's tokens and speed, and how full the context is"""
        if self._last is not None:
            usage = self._last.usage
            print(
                f"last answer: {usage.prompt_tokens} tokens of prompt, {usage.cached_tokens} of them known already; "
                f"{usage.new_tokens} new\n"
                f"speed: {usage.prefill_rate:.1f} tokens/s of prompt, {usage.decode_rate:.1f} tokens/s of answer"
            )
        print(f"context: {len(self._model.engine.tokens)} of {self._model.context} tokens")

    def do_save(self, file: str) -> None:
        """/save FILE                write the conversation, system text included, as JSON"""
        path = _path(file)
        data = {"messages": self._with_system(self.messages)}
        _write_whole(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        _say(f"(saved to {path})")

    def do_load(self, file: str) -> None:
        """/load FILE                go on with a saved conversation"""
        path = _path(file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None
        data = strict_json.parse(content.removeprefix(b"\xef\xbb\xbf"), str(path), BadInput)
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list):
            raise BadInput(f"{path}: no saved conversation: it has no list of messages")
        if messages:
            self._model.tokenizer.encode_chat(messages)   # raises BadRequest, which names the message that is wrong
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        self.system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        self.messages = [turn for turn in turns if turn["role"] != "system"]
        _say(f"({len(self.messages)} messages from {path})")

    def do_exit(self, _: str) -> None:
        """/exit                     leave; Ctrl-D does too"""
        self.over = True

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _answer(self, messages: list[Message], settings: dict[str, Any]) -> None:
        """Stream the answer to `messages`, whose last is the user's; on success they are the conversation."""
        stopped = False
        with stoppable() as pressed, StatusLine() as status:
            try:
                reply = self._model.chat(
                    self._with_system(messages), **settings, progress=status.prompt_progress, cancel=pressed
                )
                self._last = reply
                _stream(reply)
            except ContextOverflow as error:
                raise BadInput(f"{error}: shorten the message, or begin anew with /clear") from None
            except Cancelled:
                stopped = True
        if reply.text or not stopped:
            self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        if stopped:
            _say("(stopped)" if reply.text else "(stopped before the answer began: the conversation is as it was)")
        elif not reply.text:
            _say("(an empty answer)")
        elif reply.finish_reason == "length":
            _say(f"(ended after {settings['max_new_tokens']} tokens: /set max_new_tokens)")
        elif reply.finish_reason == "context":
            _say(f"(the context of {self._model.context} tokens is full: /clear begins anew)")


def _stream(reply: Reply) -> None:
    """Print an answer as it comes; the line ends whatever happens."""
    shown = printable if sys.stdout.isatty() else str
    try:
        for piece in reply:
            print(shown(piece), end="", flush=True)
    finally:
        if reply.text:
            print(flush=True)


def _plain_line() -> str:
    """A line of standard input; one that ends in a backslash goes on in the next."""
    lines: list[str] = []
    while True:
        if sys.stdin.isatty():
            print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line and not lines:
            raise EOFError
        lines.append(line.removeprefix("\ufeff").rstrip("\r\n"))
        if not line or not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises BadRequest for the first that is out of range."""
    sampling = dict(settings)
    max_new_tokens = sampling.pop("max_new_tokens")
    SamplingParams(**sampling)
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        message = f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, at least 1, or none"
        raise BadRequest(message, "max_new_tokens")


def _number(text: str) -> int | float | str | None:
    """What was typed as a value: a number or none; anything else stays text, for the setting's own error."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _path(file: str) -> Path:
    if not file:
        raise BadInput("which file? For example /save chat.json")
    return Path(file).expanduser()


def _write_whole(path: Path, text: str) -> None:
    """Replace a file by a complete new one, or leave it as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise BadInput(f"{path}: {error.strerror}") from None
