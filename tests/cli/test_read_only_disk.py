"""A disk that is mounted read-only: one line that names what cannot be written; what needs no writing works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgemistral
from edgemistral.demo import checkpoint_dir

ROOT = Path(__file__).parents[2]
MOUNTED = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


@pytest.fixture
def disk(tmp_path):
    """A folder with a model, which `run` mounts read-only."""
    command = ["unshare", "-m", "sh", "-c", MOUNTED, str(tmp_path), "true"]
    if sys.platform != "linux" or shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a folder read-only")
    shutil.copy(edgemistral.demo_model(), tmp_path / "model.safetensors")
    return tmp_path


def run(disk, *arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "quantize"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNTED, str(disk), sys.executable, "-m", "edgemistral", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )


def test_a_model_on_it_answers(disk):
    done = run(disk, "run", disk / "model.safetensors", "hello", "--greedy", "--max-new-tokens", "3")
    assert done.returncode == 0 and done.stdout.strip()
    assert run(disk, "verify", disk / "model.safetensors").returncode == 0


@pytest.mark.parametrize(("arguments", "named"), [
    (["quantize", checkpoint_dir(), "DISK/out.safetensors"], "out.safetensors"),
    (["run", "DISK/model.safetensors", "hello", "--session", "DISK/talk.kv"], "talk.kv"),
    (["run", "DISK/model.safetensors", "hello", "--kv-store=DISK/store"], "store"),
])
def test_what_must_be_written_is_refused_by_name(disk, arguments, named):
    done = run(disk, *(str(word).replace("DISK", str(disk)) for word in arguments))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {disk}"), done.stderr
    assert named in done.stderr.splitlines()[-1] and "Read-only file system" in done.stderr
    assert sorted(path.name for path in disk.iterdir()) == ["model.safetensors"]


def test_a_cache_on_it(disk):
    done = run(disk, "run", "demo", "hello", EDGEMISTRAL_CACHE=str(disk / "cache"))
    assert done.returncode == 1 and "EDGEMISTRAL_CACHE" in done.stderr.splitlines()[-1]      # no place for the KV cache
