"""The default model: a very small one, trained by training/train_demo.py and shipped as a checkpoint.

It is quantized on first use, and the blob is kept in the cache folder. It is not calibrated: the first user waits for it, and
calibration does not help its answers.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import edgemistral
from edgemistral.errors import BadBlob, BadInput
from edgemistral.files.blob import Blob
from edgemistral.paths import bundled_dir, cache_dir

REVISION = 5     # counts changes of the quantizer between releases, so that older files in a cache are not used
HEAD = 1 << 16   # bytes at the start of the weights (header, first embeddings) that differ for each training
ABOUT = "the demo model: very small, trained on travel talk; models/README.md tells how to get a real one"


def checkpoint_dir() -> Path:
    """The checkpoint's folder: next to this file in an installed package, models/demo in a source tree."""
    here = Path(__file__).parent
    installed = here / "checkpoint"
    return installed if installed.exists() else here.parents[1] / "models" / "demo"


def demo_model() -> Path:
    """Path of the demo model's blob, made on first use (about a second).

    Several processes may call it at the same time. Raises BadInput if the cache folder cannot be written.
    """
    source = checkpoint_dir()
    with (source / "model.safetensors").open("rb") as file:
        training = hashlib.sha256(file.read(HEAD)).hexdigest()[:8]
    blob = cache_dir() / f"demo-{edgemistral.__version__}-{REVISION}-{training}.safetensors"
    bundled = bundled_dir()
    for made in (blob, *([bundled / blob.name] if bundled is not None else [])):
        if _is_blob(made):
            return made
    from edgemistral_quantize import quantize  # only if needed: it loads numba

    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=blob.parent) as scratch:
            made = quantize(source, Path(scratch) / blob.name, calibrate="none", progress=False)
            try:
                made.replace(blob)
            except PermissionError:   # Windows: another process made it first and has it open
                if not _is_blob(blob):
                    raise
    except OSError as problem:
        raise BadInput(f"{blob}: cannot be made: {problem.strerror}; EDGEMISTRAL_CACHE names another folder") from None
    return blob


def _is_blob(path: Path) -> bool:
    try:
        Blob.open(path).close()
    except BadBlob:
        return False
    return True
