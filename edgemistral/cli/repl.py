"""The chat in the terminal: a conversation, its /commands, and two ways to read a line."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgemistral.cli.errors import describe
from edgemistral.cli.saved_chat import Message, read_whole, turn_of, typed_path, write_whole
from edgemistral.cli.sessions import describe_session, session_files, show_session
from edgemistral.errors import BadInput, BadRequest, Cancelled, ContextOverflow
from edgemistral.extras import missing
from edgemistral.files import strict_json
from edgemistral.generate.sampler import SamplingParams
from edgemistral.model import Model, Reply
from edgemistral.session import Session
from edgemistral.terminal import StatusLine, print_answer, printable, stoppable, wrapped

NEARLY_FULL = 0.85      # of the context

# Commands of other programs that people type by habit. A word without a slash counts only as a whole line.
ALIASES = {
    "/bye": "/exit", "/quit": "/exit", "/q": "/exit", "exit": "/exit", "quit": "/exit", "exit()": "/exit",
    "quit()": "/exit", ":q": "/exit", "/?": "/help", "/h": "/help", "?": "/help", "help": "/help", "/new": "/clear",
    "/reset": "/clear", "/retry": "/regen", "/regenerate": "/regen",
}


def chat(
    model: Model, system: str | None = None, max_new_tokens: int | None = None, session: Session | None = None, **sampling: Any
) -> None:
    """Chat until /exit or the end of the input. In a terminal with line editing and history, else line by line.

    session: continue its conversation, and keep the new messages there.
    Answers and the output of commands go to standard output, everything else to standard error.
    """
    conversation = Chat(model, system, max_new_tokens, session, **sampling)
    if conversation.messages:
        _say(f"(continuing with {len(conversation.messages)} messages; /clear starts again)")
    read: Callable[[], str] = _plain_line
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            from edgemistral.cli.line_editor import line_editor
        except ModuleNotFoundError as error:
            if not (hint := missing(error)):
                raise
            _say(f"no line editing and no history: {hint}")
        else:
            read = line_editor(conversation.commands())
        name = model.path.stem if model.path else "chat"
        _say(f"{name}, context {model.context} tokens. /help lists the commands, Ctrl-D leaves.")
    try:
        while not conversation.over:
            try:
                text = read()
            except KeyboardInterrupt:
                _say("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                break
            if text.strip():
                try:
                    conversation.take(text)
                except KeyboardInterrupt:   # outside an answer, which handles it itself
                    _say("(stopped)")
    finally:
        conversation.close()


class Chat:
    """One conversation and its settings. `over` is True after /exit.

    An error with a message is printed, and the conversation stays unchanged.
    """

    def __init__(
        self, model: Model, system: str | None = None, max_new_tokens: int | None = None, session: Session | None = None,
        **sampling: Any,
    ) -> None:
        self.over = False
        self.messages: list[Message] = []   # user and assistant in turn
        self.system = system or ""
        if session is not None:
            self._take_over(session.messages, system)
        params = SamplingParams(**{**model.tokenizer.defaults, **sampling})
        # Only settings with a number; the others (a grammar, a table of biases) keep their values.
        names = [field.name for field in fields(params) if _is_number(str(field.type)) and field.name != "top_logprobs"]
        self.settings = {"max_new_tokens": max_new_tokens, **{name: getattr(params, name) for name in names}}
        self._fixed = {name: value for name, value in sampling.items() if name not in names}
        _check_settings(self.settings)
        self._model, self._session = model, session
        self._last: Reply | None = None

    def take(self, text: str) -> None:
        """One line from the user: a /command, or a message to answer. No error ends the chat."""
        try:
            command = ALIASES.get(text.rstrip().lower(), text)
            if command.startswith("/"):
                self._command(command)
            else:
                self._answer([*self.messages, {"role": "user", "content": text.strip()}], self.settings)
        except BrokenPipeError:   # the reader has closed the pipe
            raise
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            _say(f"error: {describe(error)[0]}")

    @classmethod
    def commands(cls) -> list[str]:
        """The commands, each with its slash."""
        return [f"/{name.removeprefix('do_')}" for name in vars(cls) if name.startswith("do_")]

    def _command(self, text: str) -> None:
        typed, *rest = text.split(maxsplit=1)
        name = ALIASES.get(typed.lower(), typed.lower())
        if name not in self.commands():
            near = difflib.get_close_matches(name, self.commands(), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            _say(f"unknown command {typed}: {hint}/help lists them (begin a message with a space to start it with a slash)")
        else:
            getattr(self, f"do_{name[1:]}")(rest[0].strip() if rest else "")

    def do_help(self, _: str) -> None:
        """/help                     this list"""
        for name in self.commands():
            _show(getattr(self, f"do_{name[1:]}").__doc__, indent=4)
        _show("A backslash at the end of a line, or Alt-Enter, continues the message on the next line. Ctrl-C stops an answer.")

    def do_clear(self, _: str) -> None:
        """/clear                    start a new conversation; system text and settings stay"""
        self.messages = []
        if self._session is not None:
            self._session.clear()
        _say("(a new conversation)")

    def do_system(self, text: str) -> None:
        """/system [TEXT]            show or set the system text; /system - removes it"""
        if not text:
            _show(self.system or "(no system text)")
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
                print(f"{name:20}{_shown(value)}")
            return
        name, *values = re.split(r"[\s=]+", argument, maxsplit=1)
        name = name.lower().replace("-", "_")
        if name not in self.settings:
            raise BadRequest(f"there is no setting {name}: {', '.join(self.settings)}", name)
        if not values or not values[0]:
            raise BadInput(f"which {name}? It is {_shown(self.settings[name])}; for example /set temperature 0.3")
        settings = {**self.settings, name: _number(values[0].strip())}
        _check_settings(settings)
        self.settings = settings

    def do_stats(self, _: str) -> None:
        """/stats                    the last answer's tokens and speed, and how full the context is"""
        if self._last is not None:
            usage = self._last.usage
            _show(
                f"last answer: {usage.prompt_tokens} tokens of prompt, {usage.cached_tokens} of them from the cache; "
                f"{usage.new_tokens} new\n"
                f"speed: {usage.prefill_rate:.1f} tokens/s of prompt, {usage.decode_rate:.1f} tokens/s of answer"
            )
        _show(f"context: {len(self._model.engine.tokens)} of {self._model.context} tokens")

    def do_save(self, file: str) -> None:
        """/save FILE                write the conversation, system text included, as JSON"""
        path = typed_path(file)
        data = {"messages": self._with_system(self.messages)}
        write_whole(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        _say(f"(saved to {path})")

    def do_load(self, file: str) -> None:
        """/load FILE                continue a saved conversation"""
        path = typed_path(file)
        data = strict_json.parse(read_whole(path), str(path), BadInput)
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list):
            raise BadInput(f"{path}: not a saved conversation: it has no list of messages")
        turns = [turn_of(message, f"{path}: messages[{i}]") for i, message in enumerate(messages)]
        if turns:
            self._model.tokenizer.encode_chat(turns)   # raises BadRequest, which names the message that is wrong
        self._take_over(turns, None)
        self._keep()
        _say(f"({len(self.messages)} messages from {path})")

    def do_sessions(self, folder: str) -> None:
        """/sessions [FOLDER]        list the sessions in FOLDER, or in the folder of the current session"""
        files = session_files(typed_path(folder) if folder else self._folder())
        for file in files:
            show_session(describe_session(file, verify=False))
        _say("(/resume FILE continues one)" if files else "(no sessions: edgemistral run MODEL --session FILE makes one)")

    def do_resume(self, file: str) -> None:
        """/resume FILE              continue the conversation of a session, and keep it there from now on"""
        path = typed_path(file, "/resume paris.session")
        if not path.is_absolute() and not path.exists():
            path = self._folder() / path
        if not path.exists():
            raise BadInput(f"{path}: there is no such session: /sessions lists them")
        if self._session is not None and self._session.path.resolve() == path.resolve():
            _say("(that is the current conversation)")
            return
        session = self._model.session(path)
        self.close()
        self._session = session
        if session.notice:
            _say(f"note: {session.notice}")
        self._take_over(session.messages, None)
        _say(f"(continuing with {len(self.messages)} messages from {path})")

    def do_exit(self, _: str) -> None:
        """/exit                     leave; so do exit, quit, /bye and Ctrl-D"""
        self.over = True

    def close(self) -> None:
        """Save and close the session, if there is one."""
        if self._session is not None:
            self._session.close()

    def _folder(self) -> Path:
        """The folder in which sessions are searched."""
        return Path() if self._session is None else self._session.path.parent

    def _take_over(self, turns: list[Message], system: str | None) -> None:
        """Continue a conversation; `system`, if given, replaces its system text."""
        own = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        self.system = own if system is None else system
        self.messages = [turn for turn in turns if turn["role"] != "system"]

    def _keep(self) -> None:
        if self._session is not None:
            self._session.messages = self._with_system(self.messages)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _answer(self, messages: list[Message], settings: dict[str, Any]) -> None:
        """Stream the answer to `messages`, the last of which is the user's. On success they become the conversation."""
        stopped = False
        with stoppable() as pressed, StatusLine() as status:
            try:
                status.show("thinking ...")
                reply = self._model.chat(
                    self._with_system(messages), **self._fixed, **settings, progress=status.prompt_progress, cancel=pressed,
                    session=self._session,
                )
                self._last = reply
                print_answer(reply, status)
            except ContextOverflow as error:
                raise BadInput(f"{error}: shorten the message, or start again with /clear") from None
            except Cancelled:
                stopped = True
        if reply.text or not stopped:
            self.messages = [*messages, {"role": "assistant", "content": reply.text}]
            self._keep()
        if reply.dropped:
            _say(f"(left out: the {len(reply.dropped)} oldest messages, because the conversation is too long)")
        if stopped:
            _say("(stopped)" if reply.text else "(stopped before the answer began: the conversation is unchanged)")
        elif not reply.text:
            _say("(an empty answer)")
        elif reply.finish_reason == "length":
            _say(f"(ended after {settings['max_new_tokens']} tokens: /set max_new_tokens)")
        elif reply.finish_reason == "context":
            _say(f"(the context of {self._model.context} tokens is full: /clear starts again)")
        else:
            self._warn(reply)

    def _warn(self, reply: Reply) -> None:
        """Warn before the context is full."""
        share = (reply.usage.prompt_tokens + reply.usage.new_tokens) / self._model.context
        if share >= NEARLY_FULL and not reply.dropped:
            then = "the oldest turns will be left out" if self._model.on_overflow == "drop-oldest" else "/clear starts again"
            _say(f"(the context is {share:.0%} full: {then})")


def _plain_line() -> str:
    """A line of standard input; a backslash at its end continues it on the next line."""
    lines: list[str] = []
    while True:
        if sys.stdin.isatty():
            print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line and not lines:
            raise EOFError
        lines.append(line.rstrip("\r\n"))
        if not line or not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]


def _say(text: str) -> None:
    print(wrapped(printable(text), sys.stderr), file=sys.stderr, flush=True)


def _show(text: str, indent: int = 0) -> None:
    print(wrapped(text, sys.stdout, indent))


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises BadRequest for the first setting that is out of range."""
    sampling = dict(settings)
    max_new_tokens = sampling.pop("max_new_tokens")
    SamplingParams(**sampling)
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        message = f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, at least 1, or none"
        raise BadRequest(message, "max_new_tokens")


def _is_number(kind: str) -> bool:
    """Whether an annotation is an optional number."""
    return set(kind.split(" | ")) <= {"int", "float", "None"}


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _number(text: str) -> int | float | str | None:
    """A typed value as a number or None; other text is returned unchanged, for the setting's own error."""
    if text.lower() in ("none", "off", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
