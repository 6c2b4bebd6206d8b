"""The window: chats on the left, the conversation, and the model's state below it."""

from __future__ import annotations

import time
from pathlib import Path

from conversation import COLUMN, Conversation
from library import Chat, Library
from PySide6.QtCore import QEvent, QObject, Qt, QTimer, Signal
from PySide6.QtGui import QCloseEvent, QKeyEvent, QKeySequence, QPainter, QPaintEvent, QShortcut
from PySide6.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFileDialog,
    QFrame,
    QHBoxLayout,
    QLabel,
    QListWidget,
    QListWidgetItem,
    QMainWindow,
    QMenu,
    QMessageBox,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)
from work import Work

QUANTIZE, OPEN = "Quantize a checkpoint …", "Open a model file …"
HALF = 0.5      # duty of "half speed"


class Composer(QFrame):
    """An input box that grows with its text. Enter sends, Shift+Enter begins a new line."""

    send = Signal()

    def __init__(self) -> None:
        super().__init__(objectName="composer")
        self.text = QPlainTextEdit(placeholderText="Ask something …")
        self.button = QPushButton("Send", objectName="main")
        row = QHBoxLayout(self)
        row.setContentsMargins(14, 8, 8, 8)
        row.addWidget(self.text)
        row.addWidget(self.button, alignment=Qt.AlignmentFlag.AlignBottom)
        self.text.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAsNeeded)
        self.text.document().documentLayout().documentSizeChanged.connect(self._fit)
        self.text.installEventFilter(self)
        self._fit()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() in (QEvent.Type.FocusIn, QEvent.Type.FocusOut):
            self.setProperty("focus", event.type() == QEvent.Type.FocusIn)
            self.style().polish(self)
        if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
            if enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
                self.send.emit()
                return True
        return super().eventFilter(watched, event)

    def _fit(self, *_: object) -> None:
        lines = max(1, min(8, int(self.text.document().size().height())))      # a plain text counts in lines
        self.text.setFixedHeight(lines * self.text.fontMetrics().lineSpacing() + 14)


class Picker(QComboBox):
    """A box that draws its arrow, because style sheets remove it."""

    def paintEvent(self, event: QPaintEvent) -> None:
        super().paintEvent(event)
        place = self.rect().adjusted(0, 0, -12, 0)
        QPainter(self).drawText(place, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, "▾")


class Window(QMainWindow):
    def __init__(self, library: Library, model: str | None = None) -> None:
        super().__init__()
        self.library, self.work, self.chat = library, Work(), Chat()
        self._answering, self._began, self._tokens = False, 0.0, 0
        self.setWindowTitle("edgemistral")
        self.resize(1080, 760)
        middle = self._make_middle()      # before the side, which shows a chat there
        whole = QWidget()
        row = QHBoxLayout(whole)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(0)
        row.addWidget(self._make_side())
        row.addWidget(middle, 1)
        self.setCentralWidget(whole)
        work = self.work
        for signal, slot in (
            (work.loading, self._show_loading), (work.loaded, self._show_loaded), (work.piece, self._show_piece),
            (work.reading, self._show_reading), (work.answered, self._end_answer), (work.quantizing, self._show_quantizing),
            (work.quantized, self._show_quantized), (work.failed, self._show_failure),
        ):
            signal.connect(slot)
        QShortcut(QKeySequence("Esc"), self, self.work.stop)
        QShortcut(QKeySequence("Ctrl+N"), self, self.new_chat)
        self._meter = QTimer(self, interval=250)
        self._meter.timeout.connect(self._show_meters)
        self._list_chats()
        self._list_models(Path(model) if model else None)
        self.composer.text.setFocus()

    # ---- parts of the window -----------------------------------------------------------------------------------------

    def _make_side(self) -> QWidget:
        side = QFrame(objectName="side")
        side.setFixedWidth(250)
        column = QVBoxLayout(side)
        column.setContentsMargins(14, 16, 14, 14)
        column.setSpacing(10)
        new = QPushButton("New chat")
        new.clicked.connect(self.new_chat)
        self.chats = QListWidget(contextMenuPolicy=Qt.ContextMenuPolicy.CustomContextMenu)
        self.chats.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.chats.itemClicked.connect(lambda item: self.open_chat(item.data(Qt.ItemDataRole.UserRole)))
        self.chats.customContextMenuRequested.connect(self._chat_menu)
        self.making = QLabel("", objectName="faint", wordWrap=True, visible=False)
        self.made = QProgressBar(textVisible=False, visible=False)
        self.half = QCheckBox("Half speed, cool and quiet")
        self.half.toggled.connect(self._set_duty)
        for part in (QLabel("edgemistral", objectName="name"), new, self.chats, self.making, self.made, self.half):
            column.addWidget(part)
        return side

    def _make_middle(self) -> QWidget:
        middle = QWidget(objectName="middle")
        column = QVBoxLayout(middle)
        column.setContentsMargins(0, 0, 0, 12)
        column.setSpacing(0)
        top = QHBoxLayout()
        top.setContentsMargins(24, 14, 24, 6)
        self.picker = Picker()
        self.picker.activated.connect(self._pick)
        self.state = QLabel("", objectName="faint")
        top.addWidget(self.picker)
        top.addSpacing(12)
        top.addWidget(self.state)
        top.addStretch(1)
        self.load_bar = QProgressBar(textVisible=False)
        stays = self.load_bar.sizePolicy()
        stays.setRetainSizeWhenHidden(True)
        self.load_bar.setSizePolicy(stays)
        self.conversation = Conversation()
        self.conversation.example.connect(self.ask)
        self.composer = Composer()
        self.composer.send.connect(self._send)
        self.composer.button.clicked.connect(self._send_or_stop)
        below = QHBoxLayout()
        below.setContentsMargins(24, 4, 24, 0)
        inner = QWidget(maximumWidth=COLUMN + 40)
        lines = QVBoxLayout(inner)
        lines.setContentsMargins(0, 0, 0, 0)
        lines.setSpacing(8)
        lines.addWidget(self.composer)
        lines.addLayout(self._make_meters())
        below.addStretch(1)
        below.addWidget(inner, 100)
        below.addStretch(1)
        column.addLayout(top)
        column.addWidget(self.load_bar)
        column.addWidget(self.conversation, 1)
        column.addLayout(below)
        return middle

    def _make_meters(self) -> QHBoxLayout:
        row = QHBoxLayout()
        row.setContentsMargins(4, 0, 4, 0)
        self.context = QProgressBar(textVisible=False, maximumWidth=120)
        self.context_text, self.speed = QLabel("", objectName="meter"), QLabel("", objectName="meter")
        row.addWidget(self.context, 1)
        row.addWidget(self.context_text)
        row.addStretch(1)
        row.addWidget(self.speed)
        return row

    # ---- models ------------------------------------------------------------------------------------------------------

    def _list_models(self, chosen: Path | None) -> None:
        paths = self.library.models()
        if chosen is not None and chosen not in paths:
            paths.append(chosen)
        self.picker.clear()
        for number, path in enumerate(paths):
            self.picker.addItem("Demo (very small)" if number == 0 else path.name.removesuffix(".safetensors"), path)
        self.picker.insertSeparator(self.picker.count())
        self.picker.addItem(QUANTIZE)
        self.picker.addItem(OPEN)
        self.picker.setCurrentIndex(paths.index(chosen or paths[0]))
        self._load(self.picker.currentData())

    def _pick(self, index: int) -> None:
        text, path = self.picker.itemText(index), self.picker.itemData(index)
        if path is not None:
            self._load(path)
            return
        self.picker.setCurrentIndex(max(0, self.picker.findData(self._path)))
        if text == QUANTIZE:
            if folder := QFileDialog.getExistingDirectory(self, "The folder of a checkpoint: config.json and *.safetensors"):
                self.quantize(Path(folder))
        elif text == OPEN:
            name, _ = QFileDialog.getOpenFileName(self, "A quantized model", "", "Models (*.safetensors)")
            if name:
                self._list_models(Path(name))

    def _load(self, path: Path) -> None:
        self.work.stop()
        self._path, self._ready = path, False
        self._show_buttons()
        self.work.load(path, self.library.kv_store)

    def quantize(self, source: Path) -> None:
        """Quantize in the background, into the folder of models."""
        self.making.setText(f"Quantizing {source.name} …")
        for part in (self.making, self.made):
            part.show()
        self.made.setValue(0)
        self.work.quantize(source, self.library.models_folder / f"{source.name}-q4.safetensors")

    def _show_loading(self, stage: str, done: int, total: int) -> None:
        self.load_bar.show()
        self.load_bar.setRange(0, total if stage == "reading" else 0)
        self.load_bar.setValue(done)
        self.state.setText("Loading …" if stage == "reading" or not total else "Preparing for this processor, this once …")

    def _show_loaded(self) -> None:
        self._ready = True
        self.load_bar.hide()
        self._set_duty(self.half.isChecked())
        self.state.setText("")
        self._show_buttons()
        self._show_meters()

    def _show_quantizing(self, percent: int) -> None:
        self.made.setValue(percent)

    def _show_quantized(self, path: str) -> None:
        for part in (self.making, self.made):
            part.hide()
        if not self._answering:
            self._list_models(Path(path))

    # ---- chats -------------------------------------------------------------------------------------------------------

    def _list_chats(self) -> None:
        self.chats.clear()
        for chat in self.library.chats():
            item = QListWidgetItem(chat.title)
            item.setData(Qt.ItemDataRole.UserRole, chat)
            self.chats.addItem(item)
            if chat.id == self.chat.id:
                self.chats.setCurrentItem(item)

    def new_chat(self) -> None:
        self.open_chat(Chat())

    def open_chat(self, chat: Chat) -> None:
        if not self._answering:
            self.chat = chat
            self.conversation.show_chat(chat.messages, self._name())
            self._list_chats()
            self._tokens = 0
            self._show_meters()
            self.composer.text.setFocus()

    def _chat_menu(self, where: object) -> None:
        item = self.chats.itemAt(where)
        if item is not None:
            menu = QMenu(self)
            menu.addAction("Delete", lambda: self.delete_chat(item.data(Qt.ItemDataRole.UserRole)))
            menu.exec(self.chats.mapToGlobal(where))

    def delete_chat(self, chat: Chat) -> None:
        self.library.delete(chat)
        self.new_chat() if chat.id == self.chat.id else self._list_chats()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        if self._ready and not self._answering:
            self.ask(self.composer.text.toPlainText().strip())

    def _send_or_stop(self) -> None:
        self.work.stop() if self._answering else self._send()

    def ask(self, text: str) -> None:
        if not text or not self._ready or self._answering:
            return
        self.composer.text.clear()
        self.chat.messages.append({"role": "user", "content": text})
        self.conversation.ask(text)
        self.conversation.begin_answer(self._name())
        self._answering, self._began = True, time.monotonic()
        self._show_buttons()
        self._meter.start()
        self.work.answer(self.chat.messages)

    def _show_piece(self, piece: str) -> None:
        self.state.setText("")
        self.conversation.add_piece(piece)

    def _show_reading(self, done: int, total: int) -> None:
        if done < total:
            self.state.setText(f"Reading: {done} of {total} tokens")

    def _end_answer(self, error: str = "") -> None:
        reply, self._answering = self.work.reply, False
        self.conversation.end_answer(error=error)
        if reply is not None and reply.text:
            self.chat.messages.append({"role": "assistant", "content": reply.text})
        else:
            self.chat.messages.pop()       # no answer: if the question is asked again, it would be there twice
        if self.chat.messages:
            self.library.save(self.chat)
        self._meter.stop()
        self.state.setText("Stopped" if reply is not None and reply.finish_reason == "cancelled" else "")
        self._show_buttons()
        self._show_meters()
        self._list_chats()

    def _show_failure(self, what: str, why: str) -> None:
        if what == "answer":
            self._end_answer(why)
            return
        for part in (self.making, self.made):
            part.hide()
        if what == "load":
            self.load_bar.hide()
            self.state.setText("No model is loaded")
        QMessageBox.warning(self, "edgemistral", why)

    # ---- meters ------------------------------------------------------------------------------------------------------

    def _show_buttons(self) -> None:
        self.composer.button.setText("Stop" if self._answering else "Send")
        self.composer.button.setEnabled(self._answering or self._ready)
        self.picker.setEnabled(not self._answering)
        self.chats.setEnabled(not self._answering)

    def _show_meters(self) -> None:
        model, reply = self.work.model, self.work.reply
        if model is None:
            return
        usage = reply.usage if reply is not None and self.chat.messages else None
        tokens = usage.prompt_tokens + usage.new_tokens if usage is not None else 0
        self.context.setRange(0, model.context)
        self.context.setValue(tokens)
        self.context_text.setText(f"{tokens:,} of {model.context:,} tokens")
        stats = model.stats
        speed = f"{usage.decode_rate:.0f} tokens/s  ·  " if usage is not None and usage.decode_rate else ""
        memory = (stats.weights_bytes + stats.work_bytes + stats.kv_bytes) / 1e6
        size = f"{memory:.0f} MB" if memory < 1000 else f"{memory / 1000:.1f} GB"
        self.speed.setText(f"{speed}{stats.threads} threads  ·  {size}")

    def _set_duty(self, half: bool) -> None:
        if self.work.model is not None:
            self.work.model.duty = HALF if half else 1

    def _name(self) -> str:
        return self.picker.currentText().partition(" (")[0]

    def closeEvent(self, event: QCloseEvent) -> None:
        self._meter.stop()
        self.work.close()
        super().closeEvent(event)


