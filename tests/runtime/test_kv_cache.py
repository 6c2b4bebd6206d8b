"""The KV cache's file: its size, its growth, and that nothing of it stays behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemistral.errors import BadRequest
from edgemistral.runtime.kv_cache import KVCache, block_bytes, kv_file_bytes
from tests import blobs

MISTRAL_7B = blobs.config(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000, context=32768
)
SMALL = blobs.config()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path))
    return tmp_path / "kv"


def test_sizes_are_those_of_the_design():
    """32768 tokens of a 7B: 2.1 GiB in 8 bits, 4.0 in 16."""
    assert kv_file_bytes(MISTRAL_7B, 32768, 8) == 2 * 4096 + 32768 * 32 * 8 * 2 * (128 + 4)
    assert kv_file_bytes(MISTRAL_7B, 32768, 16) == 2 * 4096 + 32768 * 32 * 8 * 2 * 128 * 2
    assert kv_file_bytes(SMALL, 0, 8) == 2 * 4096
    assert kv_file_bytes(SMALL, 1, 8) == kv_file_bytes(SMALL, 256, 8) < kv_file_bytes(SMALL, 257, 8)
    assert block_bytes(32, 8) == 64 * 2 * (32 + 4) and block_bytes(32, 16) == 64 * 2 * 32 * 2


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_it_grows_by_segments_and_keeps_what_it_holds(folder, kv_bits):
    kv = KVCache(SMALL, kv_bits)
    first = kv.reserve(1).bytes
    assert first.size == kv_file_bytes(SMALL, 256, kv_bits)
    first[4096:-4096] = 7
    assert kv.reserve(256).bytes is first
    del first
    grown = kv.reserve(257)
    assert grown.bytes.size == kv_file_bytes(SMALL, 512, kv_bits)
    end = kv_file_bytes(SMALL, 256, kv_bits) - 4096
    assert (grown.bytes[4096:end] == 7).all() and not grown.bytes[end:].any()
    grown.words[1024] = -1
    assert (grown.bytes[4096:4100] == 255).all() and (grown.halves[2048:2050] == 65535).all()
    assert np.isnan(grown.floats[1024])
    kv.close()


def test_truncation_forgets_positions_but_keeps_the_file(folder):
    kv = KVCache(SMALL)
    size = kv.reserve(600).bytes.size
    kv.length = 600
    kv.truncate(600)
    kv.truncate(10)
    assert kv.length == 10
    for length in (11, -1):
        with pytest.raises(ValueError, match=f"cannot truncate 10 positions to {length}"):
            kv.truncate(length)
    assert kv.reserve(300).bytes.size == size
    kv.close()


@pytest.mark.parametrize("kv_bits", [0, 4, 32, "8", None])
def test_other_widths_are_refused(kv_bits):
    with pytest.raises(BadRequest, match=r"kv_bits is .*, must be one of 8, 16") as caught:
        KVCache(SMALL, kv_bits)
    assert caught.value.field == "kv_bits"


def test_nothing_is_made_before_it_is_needed(folder):
    KVCache(SMALL).close()
    assert not folder.exists()


def test_it_takes_the_disk_of_its_positions_and_is_deleted_on_close(folder):
    kv = KVCache(MISTRAL_7B)
    for length, segments in ((1, 1), (256, 1), (700, 3)):
        size = kv.reserve(length).bytes.size
        assert size == 2 * 4096 + segments * 256 * 32 * 8 * 2 * (128 + 4)
        if sys.platform == "linux":
            assert size <= os.fstat(kv._file.fileno()).st_blocks * 512 <= size + (1 << 20)
    kv.close()
    kv.close()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot allocate ahead")
def test_a_full_disk_is_an_error_and_no_crash(folder, monkeypatch):
    kv = KVCache(SMALL)
    kv.reserve(256).bytes[:] = 7
    kv.length = 250

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            kv.reserve(257)
        assert kv.length == 250
        assert (kv.reserve(256).bytes == 7).all()
    assert kv.reserve(257).bytes.size == kv_file_bytes(SMALL, 512, 8)
    kv.close()


def test_it_can_be_used_again_after_close(folder):
    kv = KVCache(SMALL)
    kv.reserve(300).bytes[:] = 1
    kv.close()
    assert kv.length == 0
    assert not kv.reserve(1).bytes.any()
    kv.close()


@pytest.mark.skipif(sys.platform == "win32", reason="a killed process is another thing there")
def test_a_killed_process_leaves_nothing(folder):
    code = """if True:
        import sys
        from tests import blobs
        from edgemistral.runtime.kv_cache import KVCache
        kv = KVCache(blobs.config())
        kv.reserve(300).bytes[:] = 1
        print("ready", flush=True)
        sys.stdin.read()
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert list(folder.iterdir()) == []


def test_two_caches_share_nothing(folder):
    one, two = KVCache(SMALL), KVCache(SMALL)
    one.reserve(10).bytes[:] = 1
    assert not two.reserve(10).bytes.any()
    one.close()
    two.close()
