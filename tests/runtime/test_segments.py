"""The KV cache: segments that never move, sequences that share them, and that nothing of the file stays behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemistral.errors import BadRequest
from edgemistral.files.layout import round_up
from edgemistral.kernels.kv_layout import block_bytes
from edgemistral.runtime import segments
from edgemistral.runtime.memory import physical_memory
from edgemistral.runtime.segments import KV_BITS, SegmentPool, Sequence, default_kv_budget, segment_bytes, segments_of
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
    """32768 tokens of a 7B: 1.1 GiB in 4 bits, 2.1 in 8, 4.0 in 16; a segment of 8 bits has 17 MB."""
    assert segment_bytes(MISTRAL_7B, 8) == round_up(256 * 32 * 8 * 2 * (128 + 4) + 4096, 1 << 16)
    assert segments_of(32768) * segment_bytes(MISTRAL_7B, 4) < 1.08 * 2**30
    assert segments_of(32768) * segment_bytes(MISTRAL_7B, 8) < 2.08 * 2**30
    assert segments_of(32768) * segment_bytes(MISTRAL_7B, 16) < 4.01 * 2**30
    assert [segments_of(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    assert [block_bytes(32, bits) for bits in (4, 8, 16)] == [64 * 2 * (16 + 4), 64 * 2 * (32 + 4), 64 * 2 * 64]


@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_segments_never_move(folder, kv_bits):
    pool = SegmentPool(SMALL, kv_bits)
    sequence = Sequence(pool)
    sequence.reserve(1)
    first = int(sequence.addresses[0])
    sequence.reserve(2000)
    assert len(sequence.addresses) == 8 == pool.used and sequence.addresses[0] == first
    assert len(set(sequence.addresses.tolist())) == 8 and not (sequence.addresses % 4096).any()
    for n, segment in enumerate(sequence._segments):
        segment.data[:] = n
    assert all((segment.data == n).all() for n, segment in enumerate(sequence._segments))
    assert pool.file_bytes == 8 * pool.segment_bytes
    sequence.close()
    pool.close()


def test_a_released_segment_is_used_again(folder):
    pool = SegmentPool(SMALL)
    one, two = pool.allocate(), pool.allocate()
    pool.release(one)
    assert pool.allocate() is one and pool.used == 2 and pool.file_bytes == 2 * pool.segment_bytes
    pool.release(two)
    assert pool.used_bytes == pool.segment_bytes
    pool.close()


def on_disk(folder):
    """Bytes that this process's files without a name in the folder take on the disk. Linux only."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):      # the one that lists the others
            if str(link.readlink()).startswith(f"{folder}/"):
                found[link.stat().st_ino] = link.stat().st_blocks * 512
    return sum(found.values())


def sequence_of(pool, n):
    """A sequence of the ids 0 ... n - 1 whose segments are filled with their numbers."""
    sequence = Sequence(pool)
    sequence.reserve(n)
    for number, segment in enumerate(sequence._segments):
        segment.data[:] = number + 1
    sequence.append(np.arange(n))
    return sequence


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257, 512, 600])
def test_a_fork_shares_full_segments_and_copies_the_last(folder, length):
    pool = SegmentPool(SMALL)
    sequence = sequence_of(pool, 600)
    fork, full = sequence.fork(length), length // 256
    assert fork.ids.tolist() == list(range(length))
    assert fork.addresses[:full].tolist() == sequence.addresses[:full].tolist()
    assert pool.used == 3 + (length % 256 > 0)
    if length % 256:
        copied, blocks = fork._segments[full], (length % 256 + 63) // 64
        heads = copied.data[: 16 * pool.layout.block_bytes].reshape(4, 4, -1)       # two layers of two heads
        assert (heads[:, :blocks] == full + 1).all() and not (heads[:, blocks:] == full + 1).any()
    sequence.close()
    assert pool.used == len(fork.addresses)
    fork.close()
    assert pool.used == 0
    pool.close()


def test_a_cut_into_a_shared_segment_copies_it(folder):
    pool = SegmentPool(SMALL)
    sequence = sequence_of(pool, 600)
    fork = sequence.fork(512)
    sequence.cut(300)
    assert sequence.addresses[0] == fork.addresses[0] and sequence.addresses[1] != fork.addresses[1]
    assert sequence.ids.tolist() == list(range(300)) and pool.used == 3
    sequence.cut(256)
    assert len(sequence.addresses) == 1
    for length in (257, -1):
        with pytest.raises(ValueError, match=f"cannot cut 256 positions to {length}"):
            sequence.cut(length)
    pool.close()


@pytest.mark.parametrize("kv_bits", [0, 5, 32, "8", None])
def test_other_widths_are_refused(kv_bits):
    with pytest.raises(BadRequest, match=r"kv_bits is .*, must be one of 4, 8, 16") as caught:
        SegmentPool(SMALL, kv_bits)
    assert caught.value.field == "kv_bits"


def test_nothing_is_made_before_it_is_needed(folder):
    SegmentPool(SMALL).close()
    assert not folder.exists()


def test_it_takes_the_disk_of_its_positions_and_is_deleted_on_close(folder):
    pool = SegmentPool(MISTRAL_7B)
    sequence = Sequence(pool)
    for length, needed in ((1, 1), (256, 1), (700, 3)):
        sequence.reserve(length)
        assert pool.file_bytes == needed * pool.segment_bytes
        if sys.platform == "linux":
            assert pool.file_bytes <= on_disk(folder) <= pool.file_bytes + (1 << 20)
    pool.close()
    pool.close()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has pages of one size")
def test_a_segment_asks_for_large_pages(folder):
    pool = SegmentPool(MISTRAL_7B)
    segment = pool.allocate()
    mappings = Path("/proc/self/smaps").read_text("utf-8", errors="replace")
    flags = mappings.split(f"{segment.address:x}-")[1].split("VmFlags:")[1].split("\n")[0]
    assert " hg" in flags
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for open files as Linux has them")
def test_what_is_evicted_gives_its_room_back_to_the_disk(folder, monkeypatch):
    monkeypatch.setattr(segments, "SPARE", 2 * segment_bytes(SMALL, 8))
    pool = SegmentPool(SMALL)
    first, second = sequence_of(pool, 2000), sequence_of(pool, 600)

    def takes(n):
        return pool.file_bytes == n * pool.segment_bytes and 0 <= on_disk(folder) - pool.file_bytes <= 1 << 16

    first.close()
    assert pool.used == 3 and takes(5)                                          # and two that are spare
    for segment in second.segments:
        segment.data[:] += 1
        segment.mapping.flush()
    assert takes(5)                                                             # writing takes no room that was given back
    third = sequence_of(pool, 2500)                                             # the spare ones, and new ones
    assert takes(13) and len(set(third.addresses) | set(second.addresses)) == 13
    assert all((segment.data == n + 2).all() for n, segment in enumerate(second.segments))
    assert all((segment.data == n + 1).all() for n, segment in enumerate(third.segments))
    third.close()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    fourth = sequence_of(pool, 512)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            fourth.reserve(600)
    assert fourth.length == 512 and pool.used == 5 and pool.file_bytes == 5 * pool.segment_bytes
    fourth.reserve(600)
    pool.close()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot allocate ahead")
def test_a_full_disk_is_an_error_and_no_crash(folder, monkeypatch):
    pool = SegmentPool(SMALL)
    sequence, allocate = sequence_of(pool, 250), os.posix_fallocate

    def full(file, offset, size):
        if pool.file_bytes >= 2 * pool.segment_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(file, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            sequence.reserve(600)
        assert sequence.length == 250 and len(sequence.addresses) == 1 == pool.used
        assert (sequence._segments[0].data == 1).all()
    sequence.reserve(600)
    assert len(sequence.addresses) == 3
    pool.close()


def test_the_budget_is_a_quarter_of_the_memory_and_never_more_than_half_of_the_disk(folder, monkeypatch):
    disk = shutil.disk_usage(folder.parent)
    assert 0 < default_kv_budget() <= physical_memory() // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=1 << 20))
    assert default_kv_budget() == 1 << 19
    assert SegmentPool(SMALL, budget=10 * segment_bytes(SMALL, 8) + 5).capacity == 10


@pytest.mark.skipif(sys.platform == "win32", reason="a killed process is another thing there")
def test_a_killed_process_leaves_nothing(folder):
    code = """if True:
        import sys
        from tests import blobs
        from edgemistral.runtime.segments import SegmentPool, Sequence
        sequence = Sequence(SegmentPool(blobs.config()))
        sequence.reserve(300)
        print("ready", flush=True)
        sys.stdin.read()
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert list(folder.iterdir()) == []
