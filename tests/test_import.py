"""What `import edgemistral` costs and offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgemistral

ROOT = Path(__file__).parent.parent


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_is_fast_and_leaves_heavy_modules_alone():
    code = (
        "import sys, time; start = time.perf_counter(); import edgemistral; seconds = time.perf_counter() - start;"
        "heavy = {'numba', 'llvmlite', 'sentencepiece', 'numpy', 'click', 'safetensors', 'tqdm'} & set(sys.modules);"
        "print(seconds, sorted(heavy))"
    )
    runs = [in_a_new_process(code).split(maxsplit=1) for _ in range(3)]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_the_command_line_and_the_model_class_load_without_numba():
    code = "import sys, edgemistral.cli, edgemistral.model; print({'numba', 'sentencepiece'} & set(sys.modules))"
    assert in_a_new_process(code).strip() == "set()"


def test_every_public_name_can_be_had():
    for name in edgemistral.__all__:
        assert getattr(edgemistral, name) is not None
    assert set(edgemistral.__all__) <= set(dir(edgemistral))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        edgemistral.nonsense  # noqa: B018
