"""The operations of the KV cache's formats, in tables by their number of bits: another number is a KeyError.

Kernels are made for each format. `TILE[BITS](...)` in an unrolled kernel is the call of that format's function.
To add a format: a file like `kv8`, an entry in each table, and its sizes in `kv_layout.KV_FORMATS`.
"""

from __future__ import annotations

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv4 import append_4bit, tile_4bit
from edgemistral.kernels.kv8 import append_8bit, quantize_query_to_codes, tile_8bit, transform_back
from edgemistral.kernels.kv16 import append_16bit, scale_query_16bit, tile_16bit
from edgemistral.kernels.rope import hadamard


@inlined
def _append_4bit(at, own_at, within, x, key_at, value_at, head_dim):
    hadamard(x, key_at, head_dim)
    hadamard(x, value_at, head_dim)
    append_4bit(at, within, x, key_at, value_at, head_dim)
    append_8bit(own_at, within, x, key_at, value_at, head_dim)


@inlined
def _append_8bit(at, own_at, within, x, key_at, value_at, head_dim):
    hadamard(x, key_at, head_dim)
    hadamard(x, value_at, head_dim)
    append_8bit(at, within, x, key_at, value_at, head_dim)


@inlined
def _append_16bit(at, own_at, within, x, key_at, value_at, head_dim):
    append_16bit(at, within, x, key_at, value_at, head_dim)


@inlined
def _leave(out, at, head_dim):
    """Nothing to do."""


APPEND = {4: _append_4bit, 8: _append_8bit, 16: _append_16bit}
"""(at, own_at, within, x, key_at, value_at, head_dim): write a rotated key and its value as position `within` of the block at
address `at`; x may change. own_at: the address of the copy of its own block, for formats that have one."""

QUANTIZE_QUERY = {4: quantize_query_to_codes, 8: quantize_query_to_codes, 16: scale_query_16bit}
"""(x, at, head_dim, queries, row_at): the rotated query at x[at] -> row `row_at` of the packed queries (counted over all heads
and tiles); x may change."""

TILE = {4: tile_4bit, 8: tile_8bit, 16: tile_16bit}
"""(at, ahead, queries, tile_at, row, head_dim, masked, scratch): rows `row` ... `row + ROWS - 1` of the scratch (tile `tile_at`
of the queries) meet the block at address `at`.

`masked`: whether some row may not see all of the block; the scratch says which positions each may see. `ahead`: the address of
the block to prefetch."""

FINISH = {4: transform_back, 8: transform_back, 16: _leave}
"""(out, at, head_dim): the last operation on one query's output, after all blocks."""
