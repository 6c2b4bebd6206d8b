"""The folders that edgemistral uses on this system."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

BUNDLED = "bundled"     # in a frozen application: the folder in this package that `edgemistral warmup --into` made


def cache_dir() -> Path:
    """The cache folder (compiled kernels, KV caches). `EDGEMISTRAL_CACHE` overrides it."""
    return Path(os.environ.get("EDGEMISTRAL_CACHE") or platformdirs.user_cache_dir("edgemistral", appauthor=False))


def bundled_dir() -> Path | None:
    """The read-only folder of a frozen application that replaces the cache; None if there is none."""
    folder = Path(__file__).parent / BUNDLED
    return folder if folder.is_dir() else None
