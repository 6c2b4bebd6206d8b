"""The messages on the screen, drawn as they are written."""

from __future__ import annotations

from PySide6.QtCore import Qt, QTimer, Signal
from PySide6.QtGui import QResizeEvent, QTextBlockFormat, QTextCursor, QTextDocument
from PySide6.QtWidgets import (
    QFrame,
    QGridLayout,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QScrollArea,
    QTextBrowser,
    QVBoxLayout,
    QWidget,
)

COLUMN = 720           # most pixels of a line of text
LINE = 125             # distance of lines in percent of their height
REDRAW = 40            # milliseconds: a fast model writes more often than needed
EXAMPLES = (
    "What should I see in Paris?",
    "What should I eat in Lisbon?",
    "Which language do they speak in Vienna?",
    "How do I pay in Prague?",
)


class Text(QTextBrowser):
    """The model's text as Markdown, in its full height, without HTML and external content."""

    def __init__(self) -> None:
        super().__init__()
        self.setOpenLinks(False)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.document().setDocumentMargin(0)
        self.document().documentLayout().documentSizeChanged.connect(self._fit)

    def show_text(self, text: str) -> None:
        features = QTextDocument.MarkdownFeature
        self.document().setMarkdown(text, features.MarkdownDialectGitHub | features.MarkdownNoHTML)
        all_of_it, spaced = QTextCursor(self.document()), QTextBlockFormat()
        all_of_it.select(QTextCursor.SelectionType.Document)
        spaced.setLineHeight(LINE, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
        all_of_it.mergeBlockFormat(spaced)
        self._fit()

    def loadResource(self, kind: int, url: object) -> None:
        """Load no pictures, from the disk or from the network."""

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._fit()

    def _fit(self) -> None:
        self.setFixedHeight(int(self.document().size().height()) + 2)


class Conversation(QScrollArea):
    """All messages of a chat; the newest is visible unless the reader has scrolled away."""

    example = Signal(str)

    def __init__(self) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._timer = QTimer(self, interval=REDRAW, singleShot=True)
        self._timer.timeout.connect(self._draw)
        self._follow = True
        self.verticalScrollBar().rangeChanged.connect(self._go_on_following)
        self.verticalScrollBar().valueChanged.connect(self._note_position)
        self.clear()

    def clear(self) -> None:
        """An empty column with a word of welcome."""
        self._timer.stop()
        self._text, self._answer = "", None
        column = QWidget(objectName="messages")
        outer = QHBoxLayout(column)
        outer.setContentsMargins(24, 28, 24, 12)
        inner = QWidget(maximumWidth=COLUMN)
        self._column = QVBoxLayout(inner)
        self._column.setContentsMargins(0, 0, 0, 0)
        self._column.setSpacing(14)
        self._column.addStretch()
        outer.addStretch(1)
        outer.addWidget(inner, 100)
        outer.addStretch(1)
        self._welcome: QWidget | None = self._make_welcome()
        self._column.insertWidget(0, self._welcome)
        self.setWidget(column)
        self._follow = True

    def ask(self, text: str) -> None:
        if self._welcome is not None:
            self._welcome.hide()
            self._welcome.deleteLater()
            self._welcome = None
        bubble = QFrame(objectName="asked")
        shown = QLabel(text, textFormat=Qt.TextFormat.PlainText, wordWrap=True,
                       textInteractionFlags=Qt.TextInteractionFlag.TextSelectableByMouse)
        inside = QHBoxLayout(bubble)
        inside.setContentsMargins(16, 10, 16, 10)
        inside.addWidget(shown)
        line = QHBoxLayout()
        line.addStretch(1)
        line.addWidget(bubble)
        shown.ensurePolished()
        wanted = max(shown.fontMetrics().horizontalAdvance(line) for line in text.splitlines())
        bubble.setFixedWidth(min(wanted + 35, COLUMN - 100))
        self._column.insertLayout(self._column.count() - 1, line)
        self._follow = True

    def begin_answer(self, name: str) -> None:
        self._column.insertWidget(self._column.count() - 1, QLabel(name, objectName="who"))
        self._text, self._answer = "", Text()
        self._column.insertWidget(self._column.count() - 1, self._answer)
        self._answer.show_text("…")

    def add_piece(self, piece: str) -> None:
        self._text += piece
        if not self._timer.isActive():
            self._timer.start()

    def end_answer(self, text: str | None = None, error: str = "") -> None:
        """text: the whole answer; None: all pieces. error: shown below it."""
        self._timer.stop()
        self._text = self._text if text is None else text
        self._draw()
        if error:
            self._column.insertWidget(self._column.count() - 1, QLabel(error, objectName="error", wordWrap=True))
        self._answer = None

    def show_chat(self, messages: list[dict[str, str]], name: str) -> None:
        self.clear()
        for message in messages:
            if message["role"] == "user":
                self.ask(message["content"])
            else:
                self.begin_answer(name)
                self.end_answer(message["content"])

    def _draw(self) -> None:
        if self._answer is not None:
            self._answer.show_text(self._text)

    def _note_position(self, value: int) -> None:
        self._follow = value >= self.verticalScrollBar().maximum() - 8

    def _go_on_following(self, _: int, most: int) -> None:
        if self._follow:
            self.verticalScrollBar().setValue(most)

    def _make_welcome(self) -> QWidget:
        welcome = QWidget()
        column = QVBoxLayout(welcome)
        column.setContentsMargins(0, 90, 0, 0)
        column.addWidget(QLabel("What would you like to know?", objectName="hello", alignment=Qt.AlignmentFlag.AlignHCenter))
        column.addWidget(
            QLabel("The model runs on this computer. Nothing you write leaves it.", objectName="faint",
                   alignment=Qt.AlignmentFlag.AlignHCenter)
        )
        column.addSpacing(22)
        grid = QGridLayout()
        grid.setSpacing(10)
        for number, text in enumerate(EXAMPLES):
            button = QPushButton(text, objectName="example")
            button.clicked.connect(lambda _=False, text=text: self.example.emit(text))
            grid.addWidget(button, number // 2, number % 2)
        column.addLayout(grid)
        return welcome
