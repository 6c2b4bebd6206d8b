"""What docs/embedding.md shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    done = subprocess.run([sys.executable, "-c", SNIPPETS[number]], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_options_and_names_are_real():
    import inspect

    import edgemistral
    from edgemistral.cli import main

    named = set(re.findall(r"`(--[a-z-]+)`", TEXT)) | set(re.findall(r" (--[a-z-]+)", TEXT))
    known = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    assert named <= known
    for name in ("progress", "max_ram", "kv_budget", "kv_store", "threads", "duty"):
        assert name in inspect.signature(edgemistral.load).parameters
