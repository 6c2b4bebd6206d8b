"""Each row of docs/clients.md: the real client, in an environment of its own, against the real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import edgemistral
from tests.clients.conftest import SCRIPTS

ROOT = Path(__file__).parents[2]
NAMES = ("chat", "stream", "structured", "tools")


def rows():
    """Script -> what the table says that the client can do."""
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| [^|]+ \| [^|]+ \|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|[^|]*\| `([\w.]+)` \|$", text, re.M)
    return {script: dict(zip(NAMES, (cell.strip() == "yes" for cell in cells), strict=True)) for *cells, script in found}


ROWS = rows()


def test_every_script_has_its_row():
    helpers = {"common.py", "common.mjs", "ai_sdk.mjs"}
    assert {path.name for pattern in ("*.py", "*.mjs") for path in SCRIPTS.glob(pattern)} - helpers == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("script", ROWS)
def test_a_client_does_what_the_table_says(script, url, loop, request):
    kind = "node" if script.endswith(".mjs") else "harness_python" if script.startswith("lm_eval") else "python"
    runner, *folder = request.getfixturevalue(kind)()
    path = folder[0] / script if folder else SCRIPTS / script
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([runner, path, url, loop, edgemistral.demo_model().stem], capture_output=True, text=True,
                          env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    can = json.loads(done.stdout.splitlines()[-1])
    assert {name: can.pop(name) for name in NAMES} == ROWS[script]
    assert all(can.values()), can      # what only this client has
