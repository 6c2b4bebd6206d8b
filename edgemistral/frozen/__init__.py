"""Support for frozen applications: PyInstaller finds our hooks through the entry point `pyinstaller40`."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Folders with hooks for PyInstaller."""
    return [str(Path(__file__).parent)]
