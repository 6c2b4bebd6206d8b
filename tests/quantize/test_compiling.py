"""Kernels that are compiled ahead of time are those that quantizing needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkpoints import SMALL, random_weights, write_hf

CODE = """
import itertools, sys
from pathlib import Path
from edgemistral_quantize import column_search, convert, quantize, scale_search
from edgemistral_quantize.compiling import compile_kernels

kernels = (scale_search.find_peaks, scale_search.quantize_panels_4, scale_search.quantize_panels_8,
           column_search._round_rows, column_search._better_rows)
compile_kernels()
ahead = [set(kernel.overloads) for kernel in kernels]
convert.ENOUGH = 1
for bits, method in itertools.product((4, 8), ("none", "fast", "full")):
    text = {} if method == "none" else {"calibration_text": Path(sys.argv[2])}
    quantize(Path(sys.argv[1]), Path(sys.argv[3]), bits=bits, calibrate=method, force=True, progress=False, **text)
assert all(ahead) and [set(kernel.overloads) for kernel in kernels] == ahead
"""


def test_nothing_is_left_to_compile(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river ran past the mill, and the wheel turned slowly. " * 60, "utf-8")
    checkpoint = write_hf(tmp_path / "checkpoint", SMALL, random_weights(SMALL))
    subprocess.run([sys.executable, "-c", CODE, str(checkpoint), str(text), str(tmp_path / "blob")], check=True)
