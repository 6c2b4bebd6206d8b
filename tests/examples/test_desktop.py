"""The desktop chat, on a screen that nobody sees: it opens, answers, stops, quantizes, and leaves nothing behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("PySide6.QtWidgets", reason="the example needs PySide6: pip install 'edgemistral[desktop]'")
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QMessageBox

from edgemistral.demo import checkpoint_dir
from tests.checkpoints import babbler

FOLDER = Path(__file__).parents[2] / "examples" / "desktop"
NAMES = ("conversation", "library", "look", "window", "work")


@pytest.fixture(scope="module")
def example():
    """The example's modules, as app.py sees them."""
    sys.path.insert(0, str(FOLDER))
    try:
        import library
        import look
        import window

        app = QApplication.instance() or QApplication([])
        look.dress(app)
        yield window, library
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def opened(example, tmp_path, monkeypatch):
    window, library = example
    threads = set(threading.enumerate())
    warned = []
    monkeypatch.setattr(QMessageBox, "warning", lambda *arguments: warned.append(arguments[-1]))
    made = window.Window(library.Library(tmp_path / "data"))
    made.warned = warned
    made.show()
    until(lambda: made._ready)
    yield made
    made.close()
    assert set(threading.enumerate()) == threads
    made.deleteLater()
    QApplication.processEvents()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        QApplication.processEvents()
        time.sleep(0.01)             # QTest.qWait keeps Python's lock in some versions: other threads would stand still


def write(window, text):
    QTest.keyClicks(window.composer.text, text)
    QTest.keyClick(window.composer.text, Qt.Key.Key_Return)


def test_it_opens_answers_and_keeps_the_chat(opened):
    assert opened.picker.currentText() == "Demo (very small)" and opened.composer.button.text() == "Send"
    write(opened, "Hello")
    assert opened.composer.button.text() == "Stop" and opened.composer.text.toPlainText() == ""
    until(lambda: not opened._answering)
    [asked, answer] = opened.chat.messages
    assert asked == {"role": "user", "content": "Hello"} and answer["role"] == "assistant" and answer["content"]
    assert opened.context.value() > 5 and "tokens" in opened.context_text.text() and "threads" in opened.speed.text()
    assert [item.title for item in opened.library.chats()] == ["Hello"]
    opened.new_chat()
    assert opened.chat.messages == []
    opened.open_chat(opened.library.chats()[0])
    assert len(opened.chat.messages) == 2 and opened.conversation._answer is None
    opened.delete_chat(opened.chat)
    assert opened.library.chats() == [] and opened.chats.count() == 0


def test_it_stops_an_answer_and_changes_models(opened, tmp_path):
    endless = Path(babbler(tmp_path))
    opened._list_models(endless)
    until(lambda: opened._ready)
    assert opened.work.model.path == endless
    opened.ask("Hello")
    until(lambda: opened.work.reply is not None and opened.work.reply.usage.new_tokens > 3)
    QTest.mouseClick(opened.composer.button, Qt.MouseButton.LeftButton)
    until(lambda: not opened._answering, 5)
    assert opened.state.text() == "Stopped" and opened.chat.messages[-1]["content"] == opened.work.reply.text
    opened.half.setChecked(True)
    assert opened.work.model.duty == 0.5
    opened.ask("Go on")                     # and it is closed in the middle of an answer


def test_it_quantizes_in_the_background(opened, tmp_path):
    opened.quantize(checkpoint_dir())
    assert not opened.made.isHidden()
    until(lambda: opened.made.isHidden())
    until(lambda: opened._ready)
    name = f"{checkpoint_dir().name}-q4"
    assert opened.picker.currentText() == name and opened.work.model.path.stem == name
    assert opened.warned == []


def test_what_goes_wrong_is_said(opened, tmp_path):
    opened.quantize(tmp_path)
    until(lambda: opened.warned)
    assert "config.json" in opened.warned[0] or str(tmp_path) in opened.warned[0]
    (tmp_path / "bad.safetensors").write_text("no model")
    opened._list_models(tmp_path / "bad.safetensors")
    until(lambda: len(opened.warned) == 2)
    assert "bad.safetensors" in opened.warned[1] and opened.state.text() == "No model is loaded"
    assert not opened.composer.button.isEnabled()


def test_the_text_of_a_model_is_no_page(example):
    from conversation import Text

    shown = Text()
    shown.show_text("**bold** <b>tag</b> ![x](file:///etc/passwd)")
    assert "<b>tag</b>" in shown.toPlainText() and "bold" in shown.toPlainText()
    assert shown.loadResource(2, "file:///etc/passwd") is None
