"""The default model: made once, whoever asks, and whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgemistral
from edgemistral.errors import BadInput
from edgemistral.files.blob import Blob


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's cache folder alone: compiled kernels stay where they are."""
    folder = tmp_path / "новый cache"
    monkeypatch.setattr("edgemistral.demo.cache_dir", lambda: folder)
    return folder


def test_made_on_first_use_and_kept(cache: Path) -> None:
    path = edgemistral.demo_model()
    made = path.stat().st_mtime_ns
    assert edgemistral.demo_model() == path
    assert path.stat().st_mtime_ns == made
    assert list(cache.iterdir()) == [path]   # nothing else left behind
    with Blob.open(path) as blob:
        blob.verify()


def test_a_broken_one_is_made_again(cache: Path) -> None:
    path = edgemistral.demo_model()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert edgemistral.demo_model().read_bytes() == whole


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_bytes(b"a file, not a folder")
    with pytest.raises(BadInput, match="EDGEMISTRAL_CACHE"):
        edgemistral.demo_model()


def test_two_processes_at_once(cache: Path) -> None:
    code = f"""
from pathlib import Path
import edgemistral.demo as demo
demo.cache_dir = lambda: Path({str(cache)!r})
print(demo.demo_model().stat().st_size)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    sizes = [int(process.communicate(timeout=120)[0]) for process in processes]
    [path] = cache.iterdir()
    assert sizes == [path.stat().st_size] * 2
    with Blob.open(path) as blob:
        blob.verify()
