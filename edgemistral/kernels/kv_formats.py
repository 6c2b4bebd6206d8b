"""Calls the functions of a format of the KV cache, chosen by its number of bits; other numbers do nothing.

To add a format: a file like `kv8`, a line in each function here, and its sizes in `kv_layout.KV_FORMATS`.
"""

from __future__ import annotations

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv4 import append_4bit, tile_4bit
from edgemistral.kernels.kv8 import append_8bit, quantize_query_to_codes, tile_8bit, transform_back
from edgemistral.kernels.kv16 import append_16bit, scale_query_16bit, tile_16bit
from edgemistral.kernels.kv_layout import POSITIONS
from edgemistral.kernels.rope import hadamard


@inlined
def append_key_value(at, own_at, bits, position, x, key_at, value_at, head_dim):
    """Write one position's rotated key and its value into the block at address `at`; x may change.

    own_at: the address of the copy of its own block, for formats that have one.
    """
    within = position % POSITIONS
    if bits == 4 or bits == 8:
        hadamard(x, key_at, head_dim)
        hadamard(x, value_at, head_dim)
        if bits == 4:
            append_4bit(at, within, x, key_at, value_at, head_dim)
        append_8bit(own_at if bits == 4 else at, within, x, key_at, value_at, head_dim)
    elif bits == 16:
        append_16bit(at, within, x, key_at, value_at, head_dim)


@inlined
def quantize_query(x, at, head_dim, bits, queries, row_at):
    """The rotated query at x[at] -> row `row_at` of the packed queries (counted over all heads and tiles); x may change."""
    if bits == 4 or bits == 8:
        quantize_query_to_codes(x, at, head_dim, queries, row_at)
    elif bits == 16:
        scale_query_16bit(x, at, head_dim, queries, row_at)


@inlined
def attend_to_block(at, ahead, bits, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch):
    """Rows `row` ... `row + ROWS - 1` of the scratch (tile `tile_at` of the queries) meet the block at address `at`.

    first_seen, last_seen: for each row the positions that it may see, counted from the block's first; `masked` says
    whether that matters in this block. `ahead`: the address of the block to prefetch.
    """
    if bits == 4:
        tile_4bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch)
    elif bits == 8:
        tile_8bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch)
    elif bits == 16:
        tile_16bit(at, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch)


@inlined
def finish_output(out, at, bits, head_dim):
    """The last operation on one query's output, after all blocks."""
    if bits == 4 or bits == 8:
        transform_back(out, at, head_dim)
