"""The default model: a very small one, trained by training/train_demo.py, that comes with the package as a blob.

In a source tree its checkpoint is there too, and `make models/demo.safetensors` quantizes it again.
It is not calibrated: that does not help its answers.
"""

from __future__ import annotations

from pathlib import Path

ABOUT = "the demo model: very small, trained on travel talk; models/README.md tells how to get a real one"
HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "models"      # of a source tree


def demo_model() -> Path:
    """Path of the demo model's blob, which must not be changed."""
    installed = HERE / "demo.safetensors"
    return installed if installed.exists() else MODELS / "demo.safetensors"


def checkpoint_dir() -> Path:
    """The folder of its checkpoint, only in a source tree."""
    return MODELS / "demo"
