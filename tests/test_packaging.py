"""What is shipped: the contents of wheel and sdist, releases, and that it works where and how people install it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

import edgemistral

ROOT = Path(__file__).parents[1]
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]
# No process may reach anything but this computer: not even ask for a name.
NO_NETWORK = """
import socket, sys

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"{event} {address}")
    if event in ("socket.getaddrinfo", "socket.gethostbyname") and arguments[0] not in (
            None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname()):
        raise PermissionError(f"{event} {arguments}")

sys.addaudithook(guard)
"""
AWKWARD = "with spaces and é ü 漢字 " + "long " * 10


def awkward(folder, length=200):
    """A folder inside this one whose whole path has so many characters, spaces, and letters that are not ASCII."""
    path = folder / AWKWARD.strip() / ("x" * max(1, length - len(str(folder / AWKWARD.strip())) - 1))
    path.mkdir(parents=True)
    return path


@pytest.fixture
def offline(tmp_path):
    """An environment whose Pythons connect to nothing but this computer."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_NETWORK, "utf-8")
    paths = [str(tmp_path / "guard"), str(ROOT), str(ROOT / "quantize")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}


# ---- the files -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def build(kind, folder):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)], cwd=ROOT, check=True,
                   capture_output=True)
    (path,) = folder.iterdir()
    return path


def files_below(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"edgemistral-{edgemistral.__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"edgemistral-{edgemistral.__version__}.dist-info/entry_points.txt").decode()
    quantizer = {name.removeprefix("quantize/") for name in files_below("quantize/edgemistral_quantize")}
    demo = {"edgemistral/demo/demo.safetensors", "edgemistral/demo/README.md"}
    assert names == files_below("edgemistral") | quantizer | demo
    assert {"edgemistral/py.typed", "edgemistral_quantize/py.typed", "edgemistral/server/page/index.html"} <= names
    assert "License-File: LICENSE" in metadata and "Requires-Python: >=3.10" in metadata
    assert "edgemistral = edgemistral.cli:main" in entry_points
    assert wheel.stat().st_size < 10e6


@pytest.mark.slow
def test_the_source_distribution_can_be_built_and_tested_from(tmp_path):
    pytest.importorskip("hatchling")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("edgemistral", "quantize", "tests", "models", "training", "examples", "docs", ".github"):
        assert files_below(folder) <= names, files_below(folder) - names
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", ".ci/constraints.txt"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {".venv", ".git", "build", "dist", "site", ".hypothesis", ".mypy_cache"}


def test_a_tag_needs_its_version_and_its_changelog():
    spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    source, dated = '__version__ = "1.2.3"\n', "# Changelog\n\n## 1.2.3 (2026-12-01)\n"
    assert check.problems("v1.2.3", dated, source) == []
    assert len(check.problems("v1.2.4", dated, source)) == 1
    assert len(check.problems("v1.2.3", "# Changelog\n\n## Unreleased\n", source)) == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+", edgemistral.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## (Unreleased|{re.escape(edgemistral.__version__)} \()", changelog, re.M)


# ---- where it runs ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shell", "registers"), [("bash", "complete "), ("zsh", "compdef "), ("fish", "complete ")])
def test_shells_complete_commands_and_options(shell, registers, monkeypatch, capsys):
    from click.shell_completion import shell_complete

    from edgemistral.cli import main

    if shell == "bash" and not shutil.which("bash"):
        pytest.skip("click asks bash for its version")
    assert shell_complete(main, {}, "edgemistral", "_EDGEMISTRAL_COMPLETE", f"{shell}_source") == 0
    assert registers in capsys.readouterr().out
    for words, at, expected in (("edgemistral ru", "1", "run"), ("edgemistral serve --por", "2", "--port")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", words.split()[-1] if shell == "fish" else at)
        assert shell_complete(main, {}, "edgemistral", "_EDGEMISTRAL_COMPLETE", f"{shell}_complete") == 0
        assert expected in capsys.readouterr().out


def test_run_and_serve_need_no_network_and_any_path(tmp_path, offline):
    """The guard itself is tried first."""
    asked = "import socket; socket.create_connection(('192.0.2.1', 9), 1)"
    tried = subprocess.run([sys.executable, "-c", asked], env=offline, capture_output=True, text=True)
    assert "PermissionError" in tried.stderr
    model = Path(shutil.copy(edgemistral.demo_model(), awkward(tmp_path) / "Modèle 7B.safetensors"))
    answers_and_serves([sys.executable, "-m", "edgemistral"], str(model), offline, tmp_path)


def answers_and_serves(command, model, environment, folder, **options):
    """The README's commands, with this model."""
    options = {"env": environment, "cwd": folder, **options}
    done = subprocess.run([*command, "run", model, "What should I see in Paris?", "--greedy", "--max-new-tokens", "12"],
                          capture_output=True, text=True, encoding="utf-8", timeout=500, **options)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    serves(command, model, **options)


def serves(command, model, **options):
    server = subprocess.Popen([*command, "serve", model, "--port", "0"], stdout=subprocess.PIPE, text=True, **options)
    try:
        url = server.stdout.readline().strip()
        end = time.monotonic() + 300
        while not healthy(url) and time.monotonic() < end:
            time.sleep(0.1)
        assert healthy(url)
        assert b"<title>" in urllib.request.urlopen(url).read()
    finally:
        server.terminate()
        server.communicate(timeout=30)


def healthy(url):
    try:
        return urllib.request.urlopen(f"{url}/health").status == 200
    except urllib.error.HTTPError as error:      # it loads the model
        with error:
            return False


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_wheel_works_in_an_empty_environment(python, wheel, tmp_path):
    """In a folder with an awkward path that cannot be written, without a network, as README says."""
    if sys.platform == "win32" or not works(python):
        pytest.skip(f"no {python}")
    home = awkward(tmp_path)
    environment = home / "venv"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary=:all:"]
    if subprocess.run([*pip, "numba"], capture_output=True).returncode != 0:
        pytest.skip("pip reaches no packages")
    subprocess.run([*pip, str(wheel)], check=True)
    command = [str(environment / "bin" / "edgemistral")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EDGEMISTRAL"))}
    missing = subprocess.run([*command, "serve", "demo"], env=clean, cwd=home, capture_output=True, text=True)
    assert missing.returncode == 1 and "pip install 'edgemistral[server]'" in missing.stderr.splitlines()[-1]
    subprocess.run([*pip, f"{wheel}[all]"], check=True)
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "sitecustomize.py").write_text(NO_NETWORK, "utf-8")
    user = nobody(command[0])
    cache = home / "cache"
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents) if user else ():
        if folder.stat().st_mode & 0o5 != 0o5:      # pytest keeps others out of its folders
            folder.chmod(folder.stat().st_mode | 0o5)
    for path in (environment, *environment.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    installed = {path for path in environment.rglob("*") if path.suffix != ".pyc"}
    try:
        answers_and_serves(command, "demo", clean | {"EDGEMISTRAL_CACHE": str(cache), "HOME": "/nonexistent"}, cache, **user)
        assert list(cache.glob("kernels/*.kernel"))
        assert {path for path in environment.rglob("*") if path.suffix != ".pyc"} == installed
    finally:
        for path in (environment, *environment.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o200)


def nobody(program):
    """Another user than root, whom no mode of a file stops, if that one can run the program."""
    user = {"user": 65534, "group": 65534, "extra_groups": []}
    if os.geteuid() != 0:
        return {}
    try:
        return user if subprocess.run([program, "--version"], capture_output=True, **user).returncode == 0 else {}
    except OSError:
        return {}


def works(python):
    try:
        return subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0
    except OSError:
        return False
