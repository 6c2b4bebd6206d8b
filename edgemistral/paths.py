"""Where files of ours live on this system."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

BUNDLED = "bundled"     # a folder in this package, in a frozen application: what `edgemistral warmup --into` made


def cache_dir() -> Path:
    """The folder for what can be made again (compiled kernels, the demo model); `EDGEMISTRAL_CACHE` overrides it."""
    return Path(os.environ.get("EDGEMISTRAL_CACHE") or platformdirs.user_cache_dir("edgemistral", appauthor=False))


def bundled_dir() -> Path | None:
    """The folder of a frozen application with what lies in the cache elsewhere, for reading only; None: there is none."""
    folder = Path(__file__).parent / BUNDLED
    return folder if folder.is_dir() else None
