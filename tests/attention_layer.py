"""One attention layer by the real kernels: for tests and for measurements of what the cache costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgemistral.files.bf16 import widen
from edgemistral.files.layout import round_up
from edgemistral.kernels.attention import ATTEND, MERGE_SPLITS, block_at, own_block_at
from edgemistral.kernels.jit import entry
from edgemistral.kernels.kv_formats import APPEND, QUANTIZE_QUERY
from edgemistral.kernels.kv_layout import KV_FORMATS, POSITIONS, SEGMENT, kv_layout
from edgemistral.kernels.rope import rotate
from edgemistral.kernels.unroll import unrolled
from edgemistral.runtime.segments import Row, own_block_bytes, segment_bytes
from edgemistral.runtime.transformer import _lay_out, _shape, _workspace
from tests import blobs, naive

F32 = np.float32
LAYER, N_LAYERS = 1, 2


class Chunk(NamedTuple):
    """One call: `tokens` tokens from `position` on."""

    position: int
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int


def _make_attend_chunk(BITS):
    @entry
    @unrolled(BITS=BITS)
    def attend_chunk(chunk, x, cos, sin, rows, kv, queries, partials, scratch, out):
        """x (tokens * heads * head_dim,): queries, keys and values of all tokens, rotated in place; out: attention's output."""
        c, hd, layer = chunk, chunk.head_dim, LAYER
        group = c.n_heads // c.n_kv_heads
        for token in range(c.tokens):
            at, angle = token * (c.n_heads + 2 * c.n_kv_heads) * hd, token * hd // 2
            for h in range(c.n_heads):
                rotate(x, at + h * hd, hd, cos, sin, angle)
                row = h // group * rows.rows_of_head + rows.query_rows[token] + h % group
                QUANTIZE_QUERY[BITS](x, at + h * hd, hd, queries, row)
            for head in range(c.n_kv_heads):
                key = at + (c.n_heads + head) * hd
                rotate(x, key, hd, cos, sin, angle)
                block = block_at(kv, rows, token, layer, head, (c.position + token) // POSITIONS)
                own = own_block_at(kv, rows, token, layer, head)
                APPEND[BITS](block, own, (c.position + token) % POSITIONS, x, key, key + c.n_kv_heads * hd, hd)
        for head in range(c.n_kv_heads):
            for span in range(0, rows.spans.size, 2):
                first, last = rows.spans[span], rows.spans[span + 1]
                for split in range(rows.splits):
                    ATTEND[BITS](kv, rows, layer, head, first, last, split, group, hd, c.window, queries, partials, out,
                                 c.n_heads * hd, scratch)
                if rows.splits > 1:
                    MERGE_SPLITS[BITS](kv, rows, head, first, last, group, hd, c.window, partials, out, c.n_heads * hd, scratch)

    return attend_chunk


ATTEND_CHUNK = {bits: _make_attend_chunk(bits) for bits in KV_FORMATS}


class Held:
    """What `_lay_out` needs of a sequence: its length, the addresses of its segments, and those of its own blocks' copies."""

    def __init__(self, length, addresses, own):
        self.length, self.addresses, self._own = length, addresses, own

    def own_blocks(self, n):
        return self._own[np.arange(self.length, self.length + n) // POSITIONS]


class Attention:
    """One attention layer with a cache of `positions` positions, whose bytes are `garbage` where nothing was written."""

    def __init__(self, bits, head_dim, n_heads, n_kv_heads, window=None, positions=512, garbage=0xFF, rope_theta=1e4):
        self.config = blobs.config(
            head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, n_layers=N_LAYERS, sliding_window=window,
            rope_theta=rope_theta, context=positions,
        )
        self.kv, self.length = kv_layout(bits, head_dim, N_LAYERS, n_kv_heads), 0
        # The segments lie in the opposite order, which must not matter.
        count, size = round_up(positions, SEGMENT) // SEGMENT, segment_bytes(self.config, bits)
        self.file = np.full(count * size, garbage, np.uint8)
        self.segments = self.file.ctypes.data + size * np.arange(count)[::-1].astype(np.int64)
        # The copies of all blocks are kept, for a look at them; attention sees only each position's own.
        self.copies = np.full((SEGMENT // POSITIONS * count, own_block_bytes(self.config, bits)), garbage, np.uint8)
        self.own = self.copies.ctypes.data + self.copies.strides[0] * np.arange(len(self.copies), dtype=np.int64)

    def append(self, qkv, shared=True):
        """qkv (T, H + 2 K, D), rotated in place -> (T, H, D). shared: in splits, if `_lay_out` says so."""
        c, tokens = self.config, len(qkv)
        positions = np.arange(self.length, self.length + tokens)
        angles = positions[:, None] * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        state, (own,) = _workspace(_shape(c), 1)
        rows = _lay_out([Row(Held(self.length, self.segments, self.own), np.zeros(tokens, np.int32), 0)], c.group)
        if not shared:
            rows = rows._replace(splits=1)
        chunk = Chunk(self.length, tokens, c.n_heads, c.n_kv_heads, c.head_dim, c.sliding_window or c.context)
        out = np.full((tokens, c.n_heads, c.head_dim), np.nan, F32)
        cos, sin = np.cos(angles).astype(F32).reshape(-1), np.sin(angles).astype(F32).reshape(-1)
        ATTEND_CHUNK[self.kv.bits](
            chunk, qkv.reshape(-1), cos, sin, rows, self.kv, state.queries, state.partials, own.attention, out.reshape(-1)
        )
        self.length += tokens
        return out

    def exact(self, qkv):
        """(T, H, D) for qkv (T, H + 2 K, D) from position 0 on, in float32."""
        c = self.config
        q, k, v = np.split(qkv, [c.n_heads, c.n_heads + c.n_kv_heads], axis=1)
        q, k = (naive.rope(x, np.arange(len(qkv)), c.rope_theta) for x in (q, k))
        return naive.attention(q, k, v, c.sliding_window)

    def block(self, head, number):
        """The stored bytes of one block."""
        at = self.block_offset(head, number)
        return self.file[at : at + self.kv.block_bytes]

    def block_offset(self, head, number):
        """Where in the file it is."""
        rows = _lay_out([Row(Held(0, self.segments, self.own), np.zeros(1, np.int32), 0)], self.config.group)
        return int(block_at.py_func(self.kv, rows, 0, LAYER, head, number)) - self.file.ctypes.data

    def copy(self, head, number):
        """The bytes of the copy of one block, which positions in it see."""
        at = (LAYER * self.kv.n_kv_heads + head) * self.kv.own_bytes
        return self.copies[number, at : at + self.kv.own_bytes]

    def held(self, own=False):
        """What the cache holds, as `read_block` gives it: keys and values (S, K, D), scales (S, K) or (S, K, 2).

        own: in the copies.
        """
        numbers = range(round_up(self.length, POSITIONS) // POSITIONS)
        block, bits = (self.copy, self.kv.own_bits) if own else (self.block, self.kv.bits)
        heads = [
            [read_block(block(head, number), bits, self.config.head_dim) for number in numbers]
            for head in range(self.config.n_kv_heads)
        ]
        parts = [[np.concatenate(part)[: self.length] for part in zip(*blocks, strict=True)] for blocks in heads]
        return [np.stack(part, axis=1) for part in zip(*parts, strict=True)]


def read_block(block, bits, head_dim):
    """The bytes of a block -> keys and values (64, D) as codes with scales (64,) (K in 4 bits: (64, 2)), or as half floats."""
    if bits == 4:
        k_scales, v_scales = widen(block[:256].view(np.uint16)).reshape(2, 64).T, block[256:512].view(F32)
        k, v = block[512:].reshape(2, -1)
        k, v = k.reshape(4, head_dim // 8, 16, 4), v.view(np.int8).reshape(16, head_dim // 32, 16, 4)
        k = np.stack([k & 15, k >> 4]).transpose(1, 3, 0, 2, 4).reshape(64, head_dim)       # 64 = panels x positions
        v = np.stack([(v & 15) - 8, v >> 4]).transpose(1, 4, 2, 0, 3).reshape(64, head_dim)   # groups x positions
        return k.astype(F32) - F32(8), k_scales, v.astype(F32) + F32(0.5), v_scales
    if bits == 8:
        k_scales, v_scales = block[:512].view(F32).reshape(2, 64)
        codes = block[512:].view(np.int8).reshape(2, -1)
        k = codes[0].reshape(4, head_dim // 4, 16, 4).transpose(0, 2, 1, 3).reshape(64, head_dim)
        return k, k_scales, codes[1].reshape(16, head_dim, 4).transpose(0, 2, 1).reshape(64, head_dim), v_scales
    halves = block.view(np.float16).reshape(2, -1)
    k = halves[0].reshape(4, head_dim, 16).transpose(0, 2, 1).reshape(64, head_dim)
    return k, halves[1].reshape(64, head_dim)
