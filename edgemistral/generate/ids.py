"""Checks token ids from callers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadRequest

Ids = Sequence[int] | NDArray[np.integer]


def check_ids(ids: Ids, vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32 (n,), n >= 1; BadRequest (field "ids") unless all are whole numbers inside the vocabulary."""
    if len(ids) == 0:
        raise BadRequest("the prompt has no tokens", "ids")
    try:
        array = np.asarray(ids)
    except ValueError:   # nested lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadRequest("token ids must be a flat list of whole numbers", "ids")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(outside):
        at = int(outside[0])
        raise BadRequest(f"token id {array[at]} at position {at} is outside the vocabulary of {vocab_size}", "ids")
    return np.ascontiguousarray(array, np.int32)
