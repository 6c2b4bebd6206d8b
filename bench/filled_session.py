"""Makes a long session without reading a long prompt: every segment holds the keys and values of the first 256 positions.

Opening, verifying, continuing and decoding cost the same as for any session. Only the model's answers have no meaning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.blob import Blob
from edgemistral.files.session import SessionFile
from edgemistral.kernels.kv_layout import SEGMENT
from edgemistral.runtime.segments import Row, Sequence
from edgemistral.runtime.session import FileSequence, geometry_of
from edgemistral.runtime.threads import performance_cores
from edgemistral.runtime.transformer import Transformer
from edgemistral.session import binding_of


def write_filled(path: Path, blob: Path, ids: NDArray[np.int32], kv_bits: int = 8, notes: str = "") -> None:
    """Write the session of these ids; a file of the name is replaced."""
    path.unlink(missing_ok=True)
    opened = Blob.open(blob)
    transformer = Transformer(opened, kv_bits=kv_bits, threads=performance_cores())
    try:
        first, pool = Sequence(transformer.pool), transformer.pool
        transformer.step([Row(first, ids[:SEGMENT], 0)])
        file = SessionFile.open(path, binding_of(opened, kv_bits), geometry_of(pool), opened.config.context, blob.name)
        filled = FileSequence(pool, file)
        filled.reserve(len(ids))
        for segment in filled.segments:
            segment.data[:] = first.segments[0].data
        filled.append(ids)
        filled.save(notes)
        filled.close()
    finally:
        transformer.close()
