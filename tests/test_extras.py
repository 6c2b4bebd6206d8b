"""The library without its extras: what is missing is one line that says what to install."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgemistral.extras import EXTRAS

ROOT = Path(__file__).parents[1]
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r})); "


def run_without_extras(code):
    return subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_library_and_the_command_line_need_no_extra():
    code = "sys.argv[1:] = ['run', 'demo', 'hi', '--greedy', '--max-new-tokens', '3']; from edgemistral.cli import main; main()"
    done = run_without_extras(code)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_serve_says_what_to_install():
    done = run_without_extras("sys.argv[1:] = ['serve', 'demo', '--port', '0']; from edgemistral.cli import main; main()")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("which is not installed: pip install 'edgemistral[server]'")


def test_importing_the_server_says_what_to_install():
    done = run_without_extras("import edgemistral.server")
    assert "ModuleNotFoundError: this needs" in done.stderr and "pip install 'edgemistral[server]'" in done.stderr


def test_a_grammar_says_what_to_install():
    code = (
        "from edgemistral.errors import EdgeMistralError; from edgemistral.generate.grammar import GrammarCompiler\n"
        "try: GrammarCompiler(None)\n"
        "except EdgeMistralError as error: print(error)"
    )
    expected = "this needs llguidance, which is not installed: pip install 'edgemistral[server]'"
    assert run_without_extras(code).stdout.strip() == expected


def test_a_tokenizer_json_says_what_to_install():
    code = (
        "from edgemistral.errors import EdgeMistralError; from edgemistral.text.bpe import BPETokenizer\n"
        "try: BPETokenizer(b'{}')\n"
        "except EdgeMistralError as error: print(error)"
    )
    expected = "this needs tokenizers, which is not installed: pip install 'edgemistral[hf]'"
    assert run_without_extras(code).stdout.strip() == expected


def test_a_module_of_no_extra_is_an_ordinary_error():
    from edgemistral.extras import missing

    assert missing(ModuleNotFoundError(name="nonsense")) is None
    assert missing(ModuleNotFoundError(name="uvicorn.protocols")) is not None


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported(path):
    """Top-level names of the modules that a file imports from outside of the standard library and of this project."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
        for name in {module.split(".")[0] for module in modules}:
            if name not in sys.stdlib_module_names and name not in ("edgemistral", "edgemistral_quantize"):
                yield name


def test_pyproject_declares_what_is_imported():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core, extras = names(project["dependencies"]), project["optional-dependencies"]
    brought = {"llvmlite": "numba", "starlette": "fastapi", "h11": "uvicorn"}
    for folder in ("edgemistral", "quantize"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name.startswith("hook-"):        # PyInstaller runs it
                continue
            for module in imported(path):
                name = brought.get(module, module).replace("_", "-")
                if module in EXTRAS:
                    assert name in names(extras[EXTRAS[module]]) and name not in core, (path, module)
                else:
                    assert name in core, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
