"""The model that runs when none is named: a very small one, trained by training/train_demo.py and shipped as a checkpoint.

It is quantized on first use and the blob is kept in the cache folder. It is not calibrated: somebody new waits for it, and it
answers as many questions right without (92 of 101; 90 with the default, 89 with `--calibrate full`).
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import edgemistral
from edgemistral.errors import BadBlob, BadInput
from edgemistral.files.blob import Blob
from edgemistral.paths import bundled_dir, cache_dir

REVISION = 5     # counts changes of the quantizer between releases, so that no older file in a cache is taken for its work
HEAD = 1 << 16   # bytes of weights that tell one training from another: header and first embeddings
ABOUT = "the demo model: very small, trained on travel talk; models/README.md tells how to get a real one"


def checkpoint_dir() -> Path:
    """The checkpoint: beside this file in an installed package, in models/demo of a source tree."""
    here = Path(__file__).parent
    installed = here / "checkpoint"
    return installed if installed.exists() else here.parents[1] / "models" / "demo"


def demo_model() -> Path:
    """Path of the demo model's blob, made on first use (about a second).

    Safe when several processes ask at once. Raises BadInput when the cache folder cannot be written.
    """
    source = checkpoint_dir()
    with (source / "model.safetensors").open("rb") as file:
        training = hashlib.sha256(file.read(HEAD)).hexdigest()[:8]
    blob = cache_dir() / f"demo-{edgemistral.__version__}-{REVISION}-{training}.safetensors"
    bundled = bundled_dir()
    for made in (blob, *([bundled / blob.name] if bundled is not None else [])):
        if _is_blob(made):
            return made
    from edgemistral_quantize import quantize  # only when there is something to make: it loads numba

    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=blob.parent) as scratch:
            made = quantize(source, Path(scratch) / blob.name, calibrate="none", progress=False)
            try:
                made.replace(blob)
            except PermissionError:   # Windows: another process was faster and has it open
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
