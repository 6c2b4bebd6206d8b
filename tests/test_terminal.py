"""Status lines and wrapped answers: what a terminal of any width shows of them."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemistral import terminal
from edgemistral.terminal import StatusLine, WordWrap, _CompileNotice, cells, cut

ANY_TEXT = st.text(st.sampled_from("ab éx漢字🙂\u0301\t\n`- ,"), max_size=80)


def wrapped(text, width, pieces=1):
    wrap = WordWrap(lambda: width)
    return "".join(wrap.push(text[at : at + pieces]) for at in range(0, len(text), pieces)) + wrap.flush()


@pytest.mark.parametrize(("text", "width", "expected"), [
    ("one two three", 80, "one two three"),
    ("one two three", 7, "one two\nthree"),
    ("one two three", 8, "one two\nthree"),
    ("one two three", 6, "one\ntwo\nthree"),
    ("one   two", 5, "one\ntwo"),
    ("a longestword b", 6, "a\nlongestword\nb"),   # the terminal breaks the long word by itself
    ("a longestword b", 8, "a\nlongestword b"),
    ("one\n  two three", 8, "one\n  two\nthree"),
    ("漢字漢字 x", 6, "漢字漢\n字 x"),
    ("ab漢字", 4, "ab漢\n字"),
    ("```\nx = a_long_line + of_code\n```\none two", 5, "```\nx = a_long_line + of_code\n```\none\ntwo"),
])
def test_words_go_whole_into_the_next_line(text, width, expected):
    assert wrapped(text, width) == expected


@given(ANY_TEXT, st.integers(1, 30), st.integers(1, 7))
def test_wrapping_changes_blanks_only_and_never_cuts_a_word(text, width, pieces):
    result = wrapped(text, width, pieces)
    assert result == wrapped(text, width)   # however it comes
    assert "".join(result.split()) == "".join(text.split())
    if "```" in text or "\t" in text:
        return
    for line in result.split("\n"):
        assert cells(line.rstrip(" ")) <= width or len(line.split()) <= 1 or _has_wide_word(line, width)


def _has_wide_word(line, width):
    """A word that is wider than a line, which the terminal breaks; words may follow it."""
    return any(cells(word) > width for word in line.split())


@given(ANY_TEXT)
def test_words_are_those_of_the_text(text):
    if not any(cells(character) == 2 for character in text):
        assert wrapped(text, 12).split() == text.split()


@given(st.text(st.sampled_from("abc漢🙂 ")), st.integers(0, 20))
def test_cut(text, width):
    assert cells(cut(text, width)) <= width
    assert cut(text, width) == text or cut(text, width).endswith("."[:width])


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [1, 2, 10, 40, 200])
def test_a_status_line_stays_on_one_line_of_any_terminal(monkeypatch, width):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "columns", lambda _: width)
    with StatusLine() as status:
        status.prompt_progress(1234567, 7654321)
        status.show("short")
        status.show("漢字" * 60)
    notice = _CompileNotice()
    notice.begin("a kernel")
    notice.end()
    shown = stream.getvalue().split("\r")
    assert len(shown) > 4 and all(cells(line) < max(width, 1) for line in shown)
    assert width < 40 or "compiling for this" in stream.getvalue()
    assert shown[-1] == ""


def test_the_width_is_asked_anew(monkeypatch):
    stream, widths = Terminal(), iter([50, 50, 10, 10, 10])
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(terminal, "columns", lambda _: next(widths))
    status = StatusLine()
    status.show("a" * 30)
    status.show("b" * 30)
    status.show("c" * 30)
    status.clear()
    assert [len(line) for line in stream.getvalue().split("\r")] == [0, 30, 30, 9, 9, 0]


def test_a_stream_without_a_terminal_counts_as_80_columns():
    assert terminal.columns(io.StringIO()) == 80
