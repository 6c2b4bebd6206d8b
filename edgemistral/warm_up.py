"""Compiles everything that a first use would compile, ahead of time: for example in an installer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgemistral.demo import demo_model
from edgemistral.files.blob import Blob
from edgemistral.kernels import stored, unroll
from edgemistral.kernels.kv_layout import KV_FORMATS
from edgemistral.measure.benchmark import Roofline
from edgemistral.model import load
from edgemistral.paths import cache_dir


@contextlib.contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """Use another cache folder while inside; None: the same."""
    if folder is None:
        yield
        return
    rewritten = {name: stored.read(name) for name in unroll.names}
    before = os.environ.get("EDGEMISTRAL_CACHE")
    os.environ["EDGEMISTRAL_CACHE"] = str(folder)
    try:
        for name, source in rewritten.items():
            stored.write(name, source)
        yield
    finally:
        del os.environ["EDGEMISTRAL_CACHE"]
        if before is not None:
            os.environ["EDGEMISTRAL_CACHE"] = before


def warm_up(into: Path | None = None) -> Path:
    """Compile all kernels for this processor; returns the folder where they are kept.

    into: the folder to use instead of the user's cache, for a frozen application that will contain it.
    Takes up to half a minute the first time, a second if everything exists. Raises BadInput if the folder cannot be written.
    """
    if into is not None:
        with cache_in(into):
            return warm_up()
    from edgemistral_quantize.compiling import compile_kernels

    blob = demo_model()
    compile_kernels()
    for kv_bits in KV_FORMATS:
        with load(blob, threads=1, kv_bits=kv_bits) as model:
            model.engine.prefill([model.config.bos_id])
    with Blob.open(blob) as opened:
        Roofline(1, opened.data).close()
    return cache_dir()
