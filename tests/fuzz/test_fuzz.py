"""A short run of each harness, everything they ever found, and that each of them can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.all import HARNESSES
from tests.fuzz.guided import FromBytes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="inputs run in forked children")


def run(*arguments, seconds):
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=Path(__file__).parents[2])


def test_a_few_hundred_inputs_are_answered_or_refused():
    done = run("--inputs", "40", "--seed", "1", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" inputs ") + done.stdout.count("skipped") == len(HARNESSES)


def test_what_was_found_stays_mended():
    done = run("--found", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_each_harness_finds_a_fault_that_is_planted():
    done = run("--plant", seconds=60 * len(HARNESSES) + 120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_random_numbers_come_from_the_bytes_and_then_from_a_generator():
    data = (7).to_bytes(4, "little") + bytes([0, 0, 0, 128])
    chance = FromBytes(data)
    assert chance.getrandbits(32) == 7 and chance.random() == 0.5
    rest = [chance.random() for _ in range(5)]
    again = FromBytes(data)
    assert [again.random() for _ in range(7)][2:] == rest and len(set(rest)) == 5


@pytest.mark.slow
def test_guided_inputs_are_answered_or_refused():
    pytest.importorskip("atheris", reason="pip install atheris")
    command = [sys.executable, "-m", "tests.fuzz.guided", "--minutes", "0.5", "--harness", "tokenizer", "--harness", "blob"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stdout.count(" inputs ") == 2, done.stdout + done.stderr
