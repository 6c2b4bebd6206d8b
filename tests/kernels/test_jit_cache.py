"""The disk cache of compiled kernels: found again, never stale, never trusted when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemistral.kernels import jit

SOURCE = """
import numpy as np
from edgemistral.kernels import jit

@jit.inner
def twice(x):
    return x + x

@jit.entry
def kernel(x):
    return twice(x[0]) + 1

def main():
    jit.on_compile = lambda name: print("compiled", name)
    print(kernel(np.arange(3.0) + 1))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """Names of what was compiled."""
    names = []
    monkeypatch.setattr(jit, "on_compile", names.append)
    return names


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "kernel_é.py"
    path.write_text(SOURCE, "utf-8")
    return path


def start(script, **environment):
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path[:0] = [{root!r}, {str(script.parent)!r}]; import {script.stem}; {script.stem}.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def lines_of(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines()


def run(script, **environment):
    return lines_of(start(script, **environment))


def plus_one(x):
    return x[0] + 1


def fresh(function=plus_one):
    """The function as a new process would have it."""
    return jit.entry(function)


ONES = np.ones(3)


def test_a_second_process_does_not_compile(cache, script):
    assert run(script) == ["compiled kernel", "3.0"]
    assert run(script) == ["3.0"]
    (file,) = cache.iterdir()
    assert file.name.startswith("kernel-") and file.suffix == ".kernel"


def test_processes_that_compile_at_once_leave_a_good_cache(cache, script):
    for lines in map(lines_of, [start(script) for _ in range(3)]):
        assert lines[-1] == "3.0"
    assert run(script) == ["3.0"]
    assert len(list(cache.iterdir())) == 1


def test_an_entry_may_call_an_entry_that_is_in_the_cache(cache, script):
    """It is called from Python afterwards, too."""
    calling = SOURCE.replace("def main():", "@jit.entry\ndef caller(x):\n    return kernel(x) + 10\n\ndef main():")
    script.write_text(calling, "utf-8")
    assert run(script) == ["compiled kernel", "3.0"]
    script.write_text(calling.replace("print(kernel(", "print(caller(np.arange(3.0) + 1), kernel("), "utf-8")
    assert run(script) == ["compiled caller", "compiled kernel", "13.0 3.0"]
    (path,) = cache.glob("caller-*")
    path.unlink()
    assert run(script) == ["compiled caller", "13.0 3.0"]


def test_parts_are_kept_with_every_entry_that_calls_them(cache, script):
    """Of two entries that share a part, and of one that calls a cached entry with parts."""
    shared = SOURCE.replace("@jit.inner", "@jit.part").replace("def main():", """
@jit.part
def both(x):
    return twice(x) + twice(x)

@jit.entry
def other(x):
    return both(x[0])

@jit.entry
def caller(x):
    return kernel(x) + 10

def main():""")
    calls = {name: shared.replace("print(kernel(", f"print({name}(") for name in ("kernel", "other", "caller")}
    for name, printed in ("kernel", "3.0"), ("other", "4.0"), ("caller", "13.0"):
        script.write_text(calls[name], "utf-8")
        files = set(cache.glob("*"))
        assert run(script) == [f"compiled {name}", *(["compiled kernel"] if name == "caller" else []), printed]
        for path in files:
            path.unlink()      # nothing else is needed
        assert run(script) == [printed]
    all_three = "x = np.arange(3.0) + 1; print(kernel(x), other(x), caller("
    script.write_text(calls["caller"].replace("print(caller(", all_three), "utf-8")
    run(script)
    assert run(script) == ["3.0 4.0 13.0"]


def test_the_same_source_is_found_again_whatever_its_date(cache, script):
    run(script)
    os.utime(script, (1, 1))
    assert run(script) == ["3.0"]


def test_an_edit_compiles_again(cache, script):
    """Also one of a helper: numba's own cache would keep the old code of the functions that call it."""
    run(script)
    script.write_text(SOURCE.replace("x + x", "x + x + x"), "utf-8")
    assert run(script) == ["compiled kernel", "4.0"]
    script.write_text(SOURCE, "utf-8")
    assert run(script) == ["3.0"]


def test_another_lowering_or_cpu_compiles_again(cache, script):
    run(script, EDGEMISTRAL_SIMD="plain")
    assert run(script, EDGEMISTRAL_SIMD="plain") == ["3.0"]
    assert run(script, EDGEMISTRAL_SIMD="plain", NUMBA_CPU_NAME="generic") == ["compiled kernel", "3.0"]
    assert run(script, EDGEMISTRAL_SIMD="avx2") == ["compiled kernel", "3.0"]      # has no vectors, so any CPU runs it


def test_other_types_are_other_files(cache, compiled):
    fresh()(ONES)
    fresh()(ONES.astype(np.float32))
    assert compiled == ["plus_one"] * 2
    assert fresh()(ONES) == fresh()(ONES.astype(np.float32)) == 2
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: b"garbage",
    lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    lambda data: data + b"more",
    lambda data: bytes(len(data)),
])
def test_a_damaged_file_is_compiled_again_and_replaced(cache, compiled, damage):
    fresh()(ONES)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert fresh()(ONES) == 2
    assert compiled == ["plus_one"] * 2
    assert fresh()(ONES) == 2
    assert len(compiled) == 2
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_without_a_place_to_write_kernels_work(tmp_path, monkeypatch, compiled):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path / "file"))      # a folder cannot be made there, even by root
    assert fresh()(ONES) == 2
    assert compiled == ["plus_one"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a folder that this user may not write")
def test_a_read_only_cache_is_read(cache, compiled):
    fresh()(ONES)
    cache.chmod(0o500)
    try:
        assert fresh()(ONES) == 2
        assert fresh()(ONES.astype(np.float32)) == 2
        assert compiled == ["plus_one"] * 2
    finally:
        cache.chmod(0o700)


def test_values_from_around_a_kernel_are_refused():
    """They are constants to the compiler, and two kernels would share one file."""
    def make(n):
        @jit.entry
        def kernel(x):
            return x[0] + n
        return kernel

    with pytest.raises(TypeError, match=r"make.<locals>.kernel takes values from around it"):
        make(1)


def test_kernels_are_strict_and_release_the_gil():
    options = fresh().targetoptions
    assert options["nogil"] and not options.get("fastmath")
