"""Quantize a checkpoint directory from Python: python examples/quantize_checkpoint.py [SRC DST]"""

import sys
import tempfile
from pathlib import Path

from edgemistral_quantize import quantize

import edgemistral
from edgemistral.demo import checkpoint_dir

with tempfile.TemporaryDirectory() as folder:
    src, dst = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else (checkpoint_dir(), Path(folder) / "demo-q8.safetensors")
    try:
        path = quantize(src, dst, bits=8, progress=False)
    except edgemistral.EdgeMistralError as error:      # one line: what is wrong and where
        sys.exit(f"error: {error}")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
