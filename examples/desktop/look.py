"""Colours and style, light or dark as in the system."""

from __future__ import annotations

from dataclasses import dataclass

from PySide6.QtCore import Qt
from PySide6.QtGui import QColor, QPalette
from PySide6.QtWidgets import QApplication


@dataclass(frozen=True)
class Colours:
    window: str
    side: str
    card: str
    line: str
    text: str
    faint: str
    accent: str
    accent_text: str
    asked: str


LIGHT = Colours("#ffffff", "#f6f5f2", "#ffffff", "#e5e2dc", "#23211e", "#837d74", "#d9541e", "#ffffff", "#f3eee7")
DARK = Colours("#1c1b1a", "#161514", "#262423", "#383532", "#ece8e2", "#9a938a", "#f0733f", "#1c1b1a", "#2e2b28")

STYLE = """
* {{ font-size: 14px; color: {text}; }}
QMainWindow, #middle {{ background: {window}; }}
#side {{ background: {side}; border-right: 1px solid {line}; }}
#name {{ font-size: 16px; font-weight: 600; }}
QLabel#faint, QLabel#meter {{ color: {faint}; font-size: 12px; }}
QLabel#hello {{ font-size: 26px; font-weight: 600; }}
QLabel#who {{ font-size: 12px; font-weight: 600; color: {faint}; }}
QLabel#error {{ color: {accent}; }}
QPushButton {{ background: {card}; border: 1px solid {line}; border-radius: 8px; padding: 7px 14px; }}
QPushButton:hover {{ border-color: {accent}; }}
QPushButton:disabled {{ color: {faint}; }}
QPushButton#main {{ background: {accent}; color: {accent_text}; border: none; font-weight: 600; }}
QPushButton#main:disabled {{ background: {line}; color: {faint}; }}
QPushButton#example {{ text-align: left; padding: 11px 14px; }}
QListWidget {{ background: transparent; border: none; outline: none; }}
QListWidget::item {{ padding: 8px 10px; border-radius: 7px; }}
QListWidget::item:hover {{ background: {line}; }}
QListWidget::item:selected {{ background: {asked}; color: {text}; border: 1px solid {line}; }}
QComboBox {{ background: {card}; border: 1px solid {line}; border-radius: 8px; padding: 6px 12px; min-width: 190px; }}
QComboBox::drop-down {{ border: none; width: 22px; }}
QComboBox QAbstractItemView {{ background: {card}; border: 1px solid {line}; selection-background-color: {asked};
    selection-color: {text}; outline: none; padding: 4px; }}
QCheckBox {{ color: {faint}; font-size: 12px; }}
#composer {{ background: {card}; border: 1px solid {line}; border-radius: 14px; }}
#composer[focus="true"] {{ border-color: {accent}; }}
QPlainTextEdit {{ background: transparent; border: none; }}
QTextBrowser {{ background: transparent; border: none; }}
#asked {{ background: {asked}; border-radius: 14px; }}
QScrollArea, #messages {{ background: {window}; border: none; }}
QScrollBar:vertical {{ background: transparent; width: 9px; margin: 0; }}
QScrollBar::handle:vertical {{ background: {line}; border-radius: 4px; min-height: 30px; }}
QScrollBar::add-line, QScrollBar::sub-line, QScrollBar::add-page, QScrollBar::sub-page {{ background: none; height: 0; }}
QProgressBar {{ background: {line}; border: none; border-radius: 2px; max-height: 4px; min-height: 4px; }}
QProgressBar::chunk {{ background: {accent}; border-radius: 2px; }}
QMenu {{ background: {card}; border: 1px solid {line}; padding: 4px; }}
QMenu::item {{ padding: 6px 18px; border-radius: 5px; }}
QMenu::item:selected {{ background: {asked}; }}
"""


def dress(app: QApplication) -> None:
    """Give an application its look."""
    app.setStyle("Fusion")
    dark = app.styleHints().colorScheme() == Qt.ColorScheme.Dark
    colours = DARK if dark else LIGHT
    palette = app.palette()
    for role, colour in (
        (QPalette.ColorRole.Window, colours.window), (QPalette.ColorRole.Base, colours.card),
        (QPalette.ColorRole.Text, colours.text), (QPalette.ColorRole.WindowText, colours.text),
        (QPalette.ColorRole.Highlight, colours.accent), (QPalette.ColorRole.HighlightedText, colours.accent_text),
        (QPalette.ColorRole.PlaceholderText, colours.faint), (QPalette.ColorRole.Link, colours.accent),
    ):
        palette.setColor(role, QColor(colour))
    app.setPalette(palette)
    app.setStyleSheet(STYLE.format(**vars(colours)))
