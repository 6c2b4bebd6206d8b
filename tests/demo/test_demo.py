"""The default model comes with the package, and is what the quantizer makes of its checkpoint."""

from __future__ import annotations

from pathlib import Path

from edgemistral_quantize import quantize

import edgemistral
from edgemistral.demo import checkpoint_dir


def test_its_blob_is_what_the_quantizer_makes_now(tmp_path: Path) -> None:
    """If not: make models/demo.safetensors"""
    made = quantize(checkpoint_dir(), tmp_path / "made.safetensors", calibrate="none", progress=False)
    assert made.read_bytes() == edgemistral.demo_model().read_bytes()
    assert edgemistral.demo_model().name == "demo.safetensors"       # its name for clients
