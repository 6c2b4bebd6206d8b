"""Reading a message in a terminal: line editing, several lines, history across runs, completion of /commands."""

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
    """A function that reads one message: EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C when nothing is typed."""
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,   # what is pasted keeps its line ends; Enter is bound below
        prompt_continuation=CONTINUED,
        history=_history(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,   # Tab; a menu would keep eight lines of the screen free
        key_bindings=_key_bindings(),
    )
    return session.prompt


def _key_bindings() -> KeyBindings:
    """Enter sends, unless a backslash stands before it; Alt-Enter is a line end; Ctrl-C clears what is typed."""
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
    """What was typed in earlier chats; a folder that cannot be written costs only that."""
    path = Path(platformdirs.user_data_dir("edgemistral", appauthor=False)) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)   # conversations are nobody else's business
        with path.open("a"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()
