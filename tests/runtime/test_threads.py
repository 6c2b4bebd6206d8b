"""Cores to compute with: as Linux (invented trees of /sys), Windows (invented records) and a measurement tell."""

from __future__ import annotations

import os
import struct

import pytest

from edgemistral.demo import demo_model
from edgemistral.errors import BadRequest
from edgemistral.files.blob import Blob
from edgemistral.runtime import threads as cpu
from edgemistral.runtime.plan import plan


def tree(root, files):
    """Write {path: text} below a folder."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n", "ascii")
    return root


def topology(*cores, capacities=None):
    """Files of /sys for cores that are ranges of CPUs ("0-1"), each CPU with a capacity if given."""
    files = {}
    for core in cores:
        for n in cpu._cpu_list(core):
            files[f"devices/system/cpu/cpu{n}/topology/thread_siblings_list"] = core
    for n, capacity in enumerate(capacities or []):
        files[f"devices/system/cpu/cpu{n}/cpu_capacity"] = capacity
    return files


def test_lists_of_cpus():
    assert cpu._cpu_list("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11}
    assert cpu._cpu_list("5") == {5}


def test_two_threads_of_a_core_count_once(tmp_path):
    sys_ = tree(tmp_path, topology("0,4", "1,5", "2,6", "3,7"))
    assert cpu._linux_cores(sys_, set(range(8))) == 4
    assert cpu._linux_cores(sys_, {0, 4}) == 1
    assert cpu._linux_cores(sys_, {0, 1, 2}) == 3


def test_only_performance_cores_of_intel(tmp_path):
    """Two P cores of two threads, four E cores."""
    sys_ = tree(tmp_path, topology("0-1", "2-3", "4", "5", "6", "7") | {"devices/cpu_core/cpus": "0-3"})
    assert cpu._linux_cores(sys_, set(range(8))) == 2
    assert cpu._linux_cores(sys_, {2, 6, 7}) == 1
    assert cpu._linux_cores(sys_, {5, 6, 7}) == 3      # confined to E cores: better than nothing


def test_only_performance_cores_of_arm(tmp_path):
    """Four small cores, three large ones and a larger one."""
    sys_ = tree(tmp_path, topology(*"01234567", capacities=[325] * 4 + [871] * 3 + [1024]))
    assert cpu._linux_cores(sys_, set(range(8))) == 4
    assert cpu._linux_cores(sys_, {0, 1, 2}) == 3


def test_without_a_topology_every_cpu_is_a_core(tmp_path):
    assert cpu._linux_cores(tmp_path, {0, 1, 2}) == 3


@pytest.mark.parametrize(("groups", "files", "cores"), [
    ("0::/", {}, 10**9),
    ("0::/", {"fs/cgroup/cpu.max": "max 100000"}, 10**9),
    ("0::/", {"fs/cgroup/cpu.max": "350000 100000"}, 3),
    ("0::/", {"fs/cgroup/cpu.max": "50000 100000"}, 1),
    ("0::/a/b", {"fs/cgroup/a/cpu.max": "200000 100000", "fs/cgroup/a/b/cpu.max": "max 100000"}, 2),
    ("0::/a/b", {"fs/cgroup/a/cpu.max": "800000 100000", "fs/cgroup/a/b/cpu.max": "400000 100000"}, 4),
    ("0::/of/the/host", {"fs/cgroup/cpu.max": "200000 100000"}, 2),
    ("8:cpu,cpuacct:/a\n0::/", {"fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000", "fs/cgroup/cpu/a/cpu.cfs_period_us": "50000"}, 3),
    ("8:cpu:/\n0::/", {"fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 10**9),
    ("3:cpuset:/a", {"fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000"}, 10**9),
])
def test_quotas_of_containers(tmp_path, groups, files, cores):
    tree(tmp_path / "sys", files)
    proc = tree(tmp_path / "proc", {"self/cgroup": groups})
    assert min(cpu._linux_quota(tmp_path / "sys", proc), 10**9) == cores


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu._linux_quota(tmp_path, tmp_path) > 10**9


def windows_core(efficiency, *masks):
    """One record of GetLogicalProcessorInformationEx; masks: (CPUs, group)."""
    size = 32 + 16 * len(masks)
    head = struct.pack("<IIBB20xH", 0, size, 1, efficiency, len(masks))
    return head + b"".join(struct.pack("<QH6x", *mask) for mask in masks)


def test_windows_records():
    large, small = [windows_core(1, (0b11 << 2 * n, 0)) for n in range(2)], [windows_core(0, (16 << n, 0)) for n in range(4)]
    assert cpu._windows_cores(b"".join(large + small), 0) == 2
    assert cpu._windows_cores(b"".join(large + small), 0b0001) == 1
    assert cpu._windows_cores(b"".join(large + small), 0b11110000) == 4
    assert cpu._windows_cores(windows_core(0, (1, 0)) + windows_core(0, (1, 1)), 1) == 2
    assert cpu._windows_cores(b"", 0) == 0


def test_this_machine():
    assert 1 <= cpu.performance_cores() <= (os.cpu_count() or 1)


def test_what_cannot_be_told_is_every_cpu(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "plan9")
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: None)
    assert cpu.performance_cores() == 1


# ---- measured --------------------------------------------------------------------------------------------------------

def test_numbers_of_threads_to_try():
    assert cpu.candidates(1, 1) == [1]
    assert cpu.candidates(2, 2) == [1, 2]
    assert cpu.candidates(8, 16) == [4, 6, 8, 12, 16]
    assert cpu.candidates(6, 12) == [3, 4, 6, 9, 12]


def test_the_fastest_number_is_remembered_for_a_shape(monkeypatch, tmp_path):
    measured = []

    def seconds(path, threads):
        measured.append(threads)
        return {4: 1.2, 6: 1.02, 8: 1.0, 12: 1.1, 16: 1.3}[threads]

    with Blob.open(demo_model()) as blob:
        monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path))
        monkeypatch.setattr(cpu, "performance_cores", lambda: 8)
        monkeypatch.setattr(cpu.os, "cpu_count", lambda: 16)
        monkeypatch.setattr(cpu, "_seconds_of_a_token", seconds)
        assert plan(blob, threads="auto").threads == 6      # 2 % slower than 8, and leaves two cores to others
        assert measured == [4, 6, 8, 12, 16]
        assert cpu.measured_threads(blob) == 6
        assert len(measured) == 5
        monkeypatch.setattr(cpu, "performance_cores", lambda: 4)      # another machine
        monkeypatch.setattr(cpu, "_seconds_of_a_token", lambda path, threads: threads)
        assert cpu.measured_threads(blob) == 2


def test_without_a_place_to_remember_it_is_measured(monkeypatch, tmp_path):
    with Blob.open(demo_model()) as blob:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path / "file"))
        monkeypatch.setattr(cpu, "_seconds_of_a_token", lambda path, threads: 1 / threads)
        assert cpu.measured_threads(blob) == (os.cpu_count() or 1)


def test_a_token_takes_time():
    assert 0 < cpu._seconds_of_a_token(demo_model(), 1) < 1


def test_threads_that_are_no_number():
    with Blob.open(demo_model()) as blob, pytest.raises(BadRequest, match="threads is 'many'"):
        plan(blob, threads="many")
