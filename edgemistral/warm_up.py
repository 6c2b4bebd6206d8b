"""Everything that would be made on a first use, made ahead of time: by an installer, say, or before going on a train."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgemistral.demo import checkpoint_dir, demo_model
from edgemistral.files.blob import Blob
from edgemistral.measure.benchmark import Roofline
from edgemistral.model import load
from edgemistral.paths import cache_dir


def warm_up() -> Path:
    """Compile all kernels for this processor and make the demo model; returns the folder where they are kept.

    Half a minute the first time, a second when everything is there. Raises BadInput when the folder cannot be written.
    """
    from edgemistral_quantize import quantize

    blob = demo_model()
    with tempfile.TemporaryDirectory(prefix="edgemistral-") as folder:
        eight = quantize(checkpoint_dir(), Path(folder) / "8.safetensors", bits=8, progress=False)
        for path in (blob, eight):
            with load(path, threads=1) as model:      # every KV format is part of the same code
                model.engine.prefill([model.config.bos_id])
    with Blob.open(blob) as opened:
        Roofline(1, opened.data).close()
    return cache_dir()
