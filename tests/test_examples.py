"""Every script in examples/ runs and prints what its text says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "asgi_app.py": "no passwords, please",
    "chat.py": "> And in Rome?",
    "child_process.py": "Paris",
    "next_tokens.py": "%  The capital of France is",
    "quantize_checkpoint.py": "demo-q8.safetensors: ",
}


def test_every_example_is_listed_and_tested():
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == set(EXPECTED)
    assert all(f"]({name})" in readme for name in scripts)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name):
    done = subprocess.run(
        [sys.executable, f"examples/{name}"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout and done.stdout.strip()
