"""Makes everything that a first use would make, ahead of time: for example in an installer, or before going offline."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgemistral.demo import checkpoint_dir, demo_model
from edgemistral.files.blob import Blob
from edgemistral.kernels import stored, unroll
from edgemistral.kernels.kv_layout import KV_FORMATS
from edgemistral.measure.benchmark import Roofline
from edgemistral.model import load
from edgemistral.paths import cache_dir


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Use another cache folder while inside."""
    before = os.environ.get("EDGEMISTRAL_CACHE")
    os.environ["EDGEMISTRAL_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["EDGEMISTRAL_CACHE"]
        if before is not None:
            os.environ["EDGEMISTRAL_CACHE"] = before


def warm_up(into: Path | None = None) -> Path:
    """Compile all kernels for this processor and make the demo model; returns the folder where they are kept.

    into: the folder to use instead of the user's cache, for a frozen application that will contain it.
    Takes half a minute the first time, a second if everything exists. Raises BadInput if the folder cannot be written.
    """
    if into is not None:
        rewritten = {name: stored.read(name) for name in unroll.names}
        with _cache_in(into):
            for name, source in rewritten.items():
                stored.write(name, source)
            return warm_up()
    from edgemistral_quantize import quantize

    blob = demo_model()
    with tempfile.TemporaryDirectory(prefix="edgemistral-") as folder:
        for bits in (8, 4):
            quantize(checkpoint_dir(), Path(folder) / f"{bits}.safetensors", bits=bits, progress=False)
    for kv_bits in KV_FORMATS:
        with load(blob, threads=1, kv_bits=kv_bits) as model:
            model.engine.prefill([model.config.bos_id])
    with Blob.open(blob) as opened:
        Roofline(1, opened.data).close()
    return cache_dir()
