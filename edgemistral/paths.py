"""Where files of ours live on this system."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder for what can be made again (compiled kernels, the demo model); `EDGEMISTRAL_CACHE` overrides it."""
    return Path(os.environ.get("EDGEMISTRAL_CACHE") or platformdirs.user_cache_dir("edgemistral", appauthor=False))
