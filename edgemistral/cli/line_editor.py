"""Reads a message in a terminal: line editing, several lines, history across runs, completion of /commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

PROMPT, CONTINUED = "> ", "... "


def line_editor(commands: Sequence[str]) -> Callable[[], str]:
    """A function that reads one message: EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C on an empty line."""
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,   # pasted text keeps its line ends; Enter is bound below
        prompt_continuation=CONTINUED,
        history=_history(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,   # Tab; a menu would reserve eight lines of the screen
        key_bindings=_key_bindings(),
    )
    return session.prompt


def _key_bindings() -> KeyBindings:
    """Enter sends, except after a backslash; Alt-Enter is a line end; Ctrl-C clears the line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


def _history() -> History:
    """The lines typed in earlier chats. Without a writable folder there is no history."""
    path = Path(platformdirs.user_data_dir("edgemistral", appauthor=False)) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)   # conversations are private
        with path.open("a"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()
