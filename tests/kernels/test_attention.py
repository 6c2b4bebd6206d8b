"""Rotary embedding, the blocks of the KV cache and attention over them, against their NumPy twins."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import pytest

from edgemistral.files.bf16 import widen
from edgemistral.files.layout import round_up
from edgemistral.files.records import KV_VERSION
from edgemistral.kernels.attention import SPAN, attend, block_at
from edgemistral.kernels.jit import entry
from edgemistral.kernels.kv_formats import append_key_value, quantize_query
from edgemistral.kernels.kv_layout import KV_FORMATS, POSITIONS, SEGMENT, KVLayout, block_bytes
from edgemistral.kernels.rope import rotate
from edgemistral.runtime.segments import Row, segment_bytes
from edgemistral.runtime.transformer import _lay_out, _shape, _workspace
from tests import blobs, naive

F32 = np.float32
STORED = {4: (2, "6672ef66"), 8: (2, "e947e889"), 16: (2, "19a6a7b3")}      # by bits: version, digest of a block
LAYER, N_LAYERS = 1, 2


class Chunk(NamedTuple):
    """One call: `tokens` tokens from `position` on."""

    position: int
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int


@entry
def attend_chunk(chunk, x, cos, sin, rows, kv, queries, scratch, out):
    """x (tokens * heads * head_dim,): queries, keys and values of every token, rotated in place; out: attention's output."""
    c, hd, layer = chunk, chunk.head_dim, LAYER
    group = c.n_heads // c.n_kv_heads
    for token in range(c.tokens):
        at, angle = token * (c.n_heads + 2 * c.n_kv_heads) * hd, token * hd // 2
        for h in range(c.n_heads):
            rotate(x, at + h * hd, hd, cos, sin, angle)
            row = h // group * rows.rows_of_head + rows.query_rows[token] + h % group
            quantize_query(x, at + h * hd, hd, kv.bits, queries, row)
        for head in range(c.n_kv_heads):
            key = at + (c.n_heads + head) * hd
            rotate(x, key, hd, cos, sin, angle)
            block = block_at(kv, rows, token, layer, head, (c.position + token) // POSITIONS)
            append_key_value(block, kv.bits, c.position + token, x, key, key + c.n_kv_heads * hd, hd)
    for head in range(c.n_kv_heads):
        for first in range(0, c.tokens, SPAN):
            attend(kv, rows, layer, head, first, min(first + SPAN, c.tokens), group, hd, c.window, queries, out,
                   c.n_heads * hd, scratch)


class Held:
    """What `_lay_out` needs of a sequence: its length, and the addresses of its segments."""

    def __init__(self, length, addresses):
        self.length, self.addresses = length, addresses


class Attention:
    """One attention layer with a cache of `positions` positions, whose bytes are `garbage` where nothing was written."""

    def __init__(self, bits, head_dim, n_heads, n_kv_heads, window=None, positions=512, garbage=0xFF, rope_theta=1e4):
        self.config = blobs.config(
            head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, n_layers=N_LAYERS, sliding_window=window,
            rope_theta=rope_theta,
        )
        self.kv, self.length = KVLayout(bits, block_bytes(head_dim, bits), N_LAYERS, n_kv_heads), 0
        # The segments lie in the opposite order, which must not matter.
        count, size = round_up(positions, SEGMENT) // SEGMENT, segment_bytes(self.config, bits)
        self.file = np.full(count * size, garbage, np.uint8)
        self.segments = self.file.ctypes.data + size * np.arange(count)[::-1].astype(np.int64)

    def append(self, qkv):
        """qkv (T, H + 2 K, D), rotated in place -> (T, H, D)."""
        c, tokens = self.config, len(qkv)
        positions = np.arange(self.length, self.length + tokens)
        angles = positions[:, None] * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        state, (own,) = _workspace(_shape(c), 1)
        rows = _lay_out([Row(Held(self.length, self.segments), np.zeros(tokens, np.int32), 0)], c.group)
        chunk = Chunk(self.length, tokens, c.n_heads, c.n_kv_heads, c.head_dim, c.sliding_window or c.context)
        out = np.full((tokens, c.n_heads, c.head_dim), np.nan, F32)
        cos, sin = np.cos(angles).astype(F32).reshape(-1), np.sin(angles).astype(F32).reshape(-1)
        attend_chunk(
            chunk, qkv.reshape(-1), cos, sin, rows, self.kv, state.queries, own.attention, out.reshape(-1)
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
        rows = _lay_out([Row(Held(0, self.segments), np.zeros(1, np.int32), 0)], self.config.group)
        return int(block_at.py_func(self.kv, rows, 0, LAYER, head, number)) - self.file.ctypes.data

    def held(self):
        """What the cache holds, as `read_block` gives it: keys and values (S, K, D), scales (S, K) or (S, K, 2)."""
        numbers = range(round_up(self.length, POSITIONS) // POSITIONS)
        heads = [
            [read_block(self.block(head, number), self.kv.bits, self.config.head_dim) for number in numbers]
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


def random_qkv(rng, tokens, config, spread=2.0):
    x = rng.standard_normal((tokens, config.n_heads + 2 * config.n_kv_heads, config.head_dim))
    return (x * spread).astype(F32)


SHAPES = [
    # head_dim, query heads, KV heads, window; lengths of the chunks
    (32, 1, 1, None, (5,)),
    (32, 6, 2, None, (300, 1, 7)),          # crosses segments of 256 positions
    (64, 4, 1, 1, (70, 1)),                 # a token sees only itself
    (64, 3, 3, 40, (33, 60, 1, 1, 30)),
    (96, 8, 2, 64, (130, 1, 20)),
    (128, 8, 1, 65, (64, 64, 1, 70)),
    (128, 8, 2, None, (63, 1, 1, 90)),
    (128, 4, 4, 200, (256, 100)),
    (512, 2, 1, None, (70,)),               # the widest head there is
]


@pytest.mark.parametrize("bits", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "n_heads", "n_kv_heads", "window", "chunks"), SHAPES)
def test_attention(bits, head_dim, n_heads, n_kv_heads, window, chunks):
    rng = np.random.default_rng(head_dim)
    attention = Attention(bits, head_dim, n_heads, n_kv_heads, window)
    qkv = random_qkv(rng, sum(chunks), attention.config)
    rotated, n_kept = qkv.copy(), n_heads + n_kv_heads
    parts = np.split(rotated, np.cumsum(chunks)[:-1])
    out = np.concatenate([attention.append(part) for part in parts])

    expected = naive.rope(qkv[:, :n_kept], np.arange(sum(chunks)), attention.config.rope_theta)
    if bits != 16:
        expected = naive.hadamard(np.concatenate([expected, qkv[:, n_kept:]], axis=1))
        np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-6 * abs(expected).max())
    else:
        np.testing.assert_allclose(rotated[:, :n_kept], expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(rotated[:, n_kept:], qkv[:, n_kept:])

    q, k, v = np.split(rotated, [n_heads, n_kept], axis=1)
    held = attention.held()
    if bits == 16:
        for got, want in zip(held, (k, v), strict=True):
            np.testing.assert_array_equal(got, want.astype(np.float16))
        expected = naive.attention(q, *(half.astype(F32) for half in held), window)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * abs(expected).max())
        return
    if bits == 8:
        quantized, tolerance = (*naive.quantize_int8(k), *naive.quantize_int8(v)), 0.03
    else:
        k_codes, k_scales = naive.quantize_int4(k.reshape(*k.shape[:2], 2, -1), 0)
        quantized, tolerance = (k_codes.reshape(k.shape), naive.f32_to_bf16(k_scales), *naive.quantize_int4(v, 0.5)), 0.3
    for got, want in zip(held, quantized, strict=True):
        np.testing.assert_array_equal(got, want)
    size = head_dim & -head_dim
    expected = naive.hadamard(naive.attention_8bit(q / F32(size), *held, window)) / size
    assert relative_error(out, expected) < 1e-3      # a rounding to codes that falls the other way is a unit of 1/255
    assert relative_error(out, naive.hadamard(naive.attention(q / F32(size), k, v, window)) / size) < tolerance


def relative_error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("bits", KV_FORMATS)
@pytest.mark.parametrize("window", [None, 50])
def test_chunks_and_garbage_change_no_bit(bits, window):
    """What was never written must not matter, whatever it is: NaN, zero, or what a longer conversation left behind."""
    rng = np.random.default_rng(bits)
    reference = Attention(bits, 64, 6, 2, window)
    qkv = random_qkv(rng, 300, reference.config)
    expected = reference.append(qkv.copy())
    for garbage in (0, 0x7F, 0x80):
        attention, parts = Attention(bits, 64, 6, 2, window, garbage=garbage), []
        cuts = np.sort(rng.choice(np.arange(1, 300), rng.integers(1, 60), replace=False))
        for part in np.split(qkv.copy(), cuts):
            parts.append(attention.append(part))
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    reference.length = 70                                # truncated, with 230 stale positions behind
    np.testing.assert_array_equal(reference.append(qkv[70:75].copy()), expected[70:75])


@pytest.mark.parametrize("bits", KV_FORMATS)
def test_writing_stays_inside_its_blocks(bits):
    """Each position's bytes are written once, by no other position, layer or head; the page behind the end stays as it was."""
    rng, attention = np.random.default_rng(0), Attention(bits, 32, 2, 1, positions=256)
    attention.append(random_qkv(rng, 256, attention.config))
    written = attention.file != 0xFF
    ours = np.zeros_like(written)
    for number in range(4):
        at = attention.block_offset(0, number)
        ours[at : at + attention.kv.block_bytes] = True
    assert not written[~ours].any()
    assert written[ours].mean() > 0.95       # some bytes are 0xFF by chance


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.2), (8, 0.01)])
def test_a_sink_with_tiny_values_keeps_its_share(bits, tolerance):
    """Trained models give the first position most of the attention and a tiny value, which must cost few bits nothing."""
    rng, attention = np.random.default_rng(0), Attention(bits, 128, 4, 1, rope_theta=1e30)      # hardly turns
    qkv = random_qkv(rng, 256, attention.config, spread=1.0)
    direction = rng.standard_normal(128)
    qkv[:, :4] += direction
    qkv[:, 4] *= 0.3
    qkv[0, 4], qkv[0, 5] = direction * (2 / 3), qkv[0, 5] / 1000       # half of the attention
    exact = attention.exact(qkv)
    assert relative_error(attention.append(qkv), exact) < tolerance


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.1), (8, 0.005)])
def test_outliers_of_few_dimensions_cost_little(bits, tolerance):
    """Trained models have dimensions of K, and some of V, that are twenty times larger than the rest."""
    rng, attention = np.random.default_rng(0), Attention(bits, 128, 4, 1, rope_theta=1e30)
    qkv = random_qkv(rng, 256, attention.config, spread=1.0)
    qkv[:, 4, [7, 71, 100]] *= 20
    qkv[:, :4, [7, 71, 100]] /= 20
    qkv[:, 5, 30] += 20
    exact = attention.exact(qkv)
    assert relative_error(attention.append(qkv), exact) < tolerance


@pytest.mark.parametrize("bits", KV_FORMATS)
def test_zeros_and_large_numbers(bits):
    rng, attention = np.random.default_rng(0), Attention(bits, 64, 4, 2)
    qkv = random_qkv(rng, 130, attention.config)
    qkv[:64] = 0                         # a whole block of nothing: no key, no value, no query
    qkv[70, :4], qkv[100, 6:] = 0, 0
    qkv[90, :] *= 100                    # scores in the thousands: one position takes all the attention
    exact = attention.exact(qkv)
    out = attention.append(qkv)
    assert np.isfinite(out).all()
    assert not out[:64].any()
    assert relative_error(out, exact) < (0.4 if bits == 4 else 0.02)


@pytest.mark.parametrize(("bits", "expected"), STORED.items())
def test_what_is_stored_has_a_version(bits, expected):
    """Sessions and stores keep these bytes. If this fails, raise `records.KV_VERSION` and write down what it is now."""
    attention = Attention(bits, 64, 2, 1, positions=64, rope_theta=1e30)
    attention.append(random_qkv(np.random.default_rng(0), 64, attention.config))
    assert (KV_VERSION, hashlib.blake2b(attention.block(0, 0).tobytes(), digest_size=4).hexdigest()) == expected
