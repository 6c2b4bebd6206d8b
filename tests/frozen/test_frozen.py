"""A program that PyInstaller makes of a script: it runs without Python and without a network, and compiles once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgemistral import frozen, paths
from edgemistral.cli import main
from edgemistral.kernels import jit

ROOT = Path(__file__).parents[2]
APP = """
import json, socket, sys, time
start = time.perf_counter()

def refuse(*arguments):
    raise OSError("no network here")

socket.socket.connect = refuse
import edgemistral
from edgemistral.kernels import jit

compiled = []
jit.on_compile = compiled.append
with edgemistral.load(edgemistral.demo_model()) as model:
    text = "".join(model.chat([{"role": "user", "content": "What should I see in Paris?"}], 20, seed=1))
json.dump({"text": text, "compiled": compiled, "seconds": time.perf_counter() - start, "frozen": sys.frozen}, sys.stdout)
"""


def test_the_hooks_are_found_where_the_entry_point_says():
    [folder] = frozen.hook_dirs()
    assert {path.name for path in Path(folder).glob("hook-*.py")} == {"hook-edgemistral.py", "hook-gguf.py"}
    assert 'hook-dirs = "edgemistral.frozen:hook_dirs"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_lies_in_the_bundle_is_used_in_place_of_the_cache(tmp_path, monkeypatch):
    bundled = tmp_path / paths.BUNDLED
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(bundled))

    def plus_one(x):
        return x + 1

    assert jit.entry(plus_one)(1) == 2
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "paths.py"))
    compiled = []
    monkeypatch.setattr(jit, "on_compile", compiled.append)
    assert jit.entry(plus_one)(1) == 2 and compiled == []
    assert jit.entry(plus_one)(1.0) == 2 and compiled == ["plus_one"]      # what is not there goes to the cache


def test_warmup_into_a_folder(tmp_path, monkeypatch):
    from edgemistral import warm_up

    asked = []
    monkeypatch.setattr(warm_up, "load", lambda *_, **__: asked.append(paths.cache_dir()) or 1 / 0)
    monkeypatch.setenv("EDGEMISTRAL_CACHE", str(tmp_path / "mine"))
    result = CliRunner().invoke(main, ["warmup", "--into", str(tmp_path / "bundle")])
    assert result.exit_code == 1 and asked == [tmp_path / "bundle"]
    assert os.environ["EDGEMISTRAL_CACHE"] == str(tmp_path / "mine")


def freeze(folder, **environment):
    """The program of APP."""
    pytest.importorskip("PyInstaller", reason="pip install pyinstaller")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    command = [
        sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR",
        "--additional-hooks-dir", frozen.hook_dirs()[0], "--specpath", str(folder), "app.py",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "quantize"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": path, **environment})
    return folder / "dist" / "app" / ("app.exe" if sys.platform == "win32" else "app")


def start(program, cache):
    """What it says, and how long it took."""
    unshare = ["unshare", "-rn"] if shutil.which("unshare") else []
    if unshare and subprocess.run([*unshare, "true"], capture_output=True).returncode:
        unshare = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    began = time.perf_counter()
    done = subprocess.run(
        [*unshare, program], capture_output=True, text=True, check=True, env={**environment, "EDGEMISTRAL_CACHE": str(cache)}
    )
    print(f"{time.perf_counter() - began:.2f} s from start to end")
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_frozen_program_compiles_once(tmp_path):
    program = freeze(tmp_path)
    first, second = start(program, tmp_path / "cache"), start(program, tmp_path / "cache")
    assert first["frozen"] and first["compiled"] and second["compiled"] == []
    assert first["text"] == second["text"] != ""
    bundle = program.parent / "_internal" / "edgemistral"
    assert (bundle / "server" / "page" / "index.html").exists()
    assert (bundle / "demo" / "demo.safetensors").exists()


@pytest.mark.slow
def test_a_frozen_program_with_its_kernels_never_compiles(tmp_path):
    from edgemistral.warm_up import warm_up

    warm_up(tmp_path / "bundle")
    program = freeze(tmp_path, EDGEMISTRAL_BUNDLE=str(tmp_path / "bundle"))
    assert start(program, tmp_path / "cache")["compiled"] == []
    assert not (tmp_path / "cache" / "kernels").exists()
