"""The JavaScript of examples/electron.md, run by Node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "examples" / "electron.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_script_asks_and_ends(tmp_path):
    [script] = re.findall(r"```js\n(.*?)```", TEXT, re.S)
    script = script.replace('spawn("edgemistral", [', f'spawn({json.dumps(sys.executable)}, ["-m", "edgemistral", ')
    script = script.replace("mistral-q4.safetensors", "demo").replace('"Hello"', '"What should I see in Paris?"')
    (tmp_path / "app.mjs").write_text(script, encoding="utf-8")
    done = subprocess.run(["node", tmp_path / "app.mjs"], capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
