"""Compiling in several processes: they make what one process makes, whoever of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import edgemistral
from edgemistral.files.blob import Blob
from edgemistral.files.layout import Recipe
from edgemistral.kernels import parts
from edgemistral.runtime import compiling, transformer
from edgemistral.runtime.segments import Row, Sequence
from edgemistral.runtime.transformer import Transformer, example_call
from tests import blobs

ROOT = Path(__file__).parents[2]
COMPILE = """
import os, sys, time
from pathlib import Path
import edgemistral
from edgemistral.kernels import jit, parts
from edgemistral.runtime import compiling
from edgemistral.runtime.transformer import example_call

begun = []
jit.on_compile = begun.append
with compiling.helpers(example_call()):
    helpers = compiling._helpers
    if sys.argv[2] == "killed":
        helpers._processes[0].kill()
    if sys.argv[2] == "alone":
        helpers = compiling._helpers = None
    with edgemistral.load(sys.argv[1], threads=1) as model:
        digest = hash(model.logits([1, 5, 9]).tobytes())
    if helpers:
        made = {path.name for path in helpers.workshop.folder.glob("part-*") if not path.suffix}
        keys = {parts.key_of(job.function.py_func.__qualname__, job.signature) for job in helpers.goals[0].jobs}
        assert made <= keys, f"not foreseen: {made - keys}"
        assert made == keys or sys.argv[2] == "killed", f"missing: {keys - made}"
        for job in helpers.goals[0].jobs:
            assert set(job.function.overloads) <= {job.signature}, job.name      # no types but those that were foreseen
assert set(begun) == {"forward_BITS8"}, begun
if helpers:
    assert not helpers.workshop.folder.exists()
    assert all(process.poll() is not None for process in helpers._processes)
print(digest)
"""


def test_the_types_of_a_step_are_known_before_there_is_a_model(tmp_path, monkeypatch):
    path = blobs.write_blob(tmp_path / "model.safetensors", blobs.config(), Recipe(8, 4))
    met = []
    compile_forward = compiling.compile_forward
    monkeypatch.setattr(transformer, "compile_forward", lambda *call: [met.append(call), compile_forward(*call)])
    model = Transformer(Blob.open(path))
    try:
        model.step([Row(Sequence(model.pool), np.array([1], np.int32), 1)])
    finally:
        model.close()
    types = [compiling._types(compiling._arguments(*call)) for call in (met[0], example_call())]
    assert types[0] == types[1]


def test_a_part_is_claimed_once(tmp_path):
    mine, theirs = (parts.Workshop(tmp_path, lambda: False) for _ in range(2))
    assert mine.claim("a") and not mine.claim("a") and not theirs.claim("a") and theirs.claim("b")


def test_nobody_waits_for_the_dead(tmp_path):
    shop = parts.Workshop(tmp_path, lambda: False)
    shop.claim("a")
    shop.wait_for("a", lambda: False)


def test_without_a_folder_a_process_works_alone(tmp_path):
    gone = parts.Workshop(tmp_path / "gone", lambda: True)
    assert not gone.claim("a")
    gone.wait_for("a", lambda: False)


def compiled(how, folder):
    """What COMPILE prints in a new process with an empty cache."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(edgemistral.demo_model()), how], capture_output=True, text=True, timeout=500,
        env=os.environ | {"EDGEMISTRAL_CACHE": str(folder / how), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'quantize'}",
                          "PYTHONHASHSEED": "0"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_helpers_make_every_part_and_nothing_is_compiled_twice(tmp_path):
    compiled("helped", tmp_path)


@pytest.mark.slow
def test_helpers_make_the_same_bits(tmp_path):
    assert compiled("helped", tmp_path) == compiled("killed", tmp_path) == compiled("alone", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="looks for processes as POSIX has them")
def test_helpers_end_with_their_parent(tmp_path):
    code = ("import os; from edgemistral.runtime import compiling; from edgemistral.runtime.transformer import example_call\n"
            "with compiling.helpers(example_call()):\n"
            "    print(*(process.pid for process in compiling._helpers._processes), flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"EDGEMISTRAL_CACHE": str(tmp_path)})
    pids = [int(pid) for pid in done.stdout.split()]
    end = time.monotonic() + 30
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.1)
    assert pids and not any(map(alive, pids))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
