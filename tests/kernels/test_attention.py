"""Rotary embedding, the blocks of the KV cache and attention over them, against their NumPy twins."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edgemistral.files.records import KV_VERSION
from edgemistral.kernels.kv_layout import KV_FORMATS, POSITIONS, SPLIT_BLOCKS
from tests import naive
from tests.attention_layer import F32, Attention

STORED = {4: (4, "6672ef66"), 8: (4, "e947e889"), 16: (4, "19a6a7b3")}      # by bits: version, digest of a block


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
    own = None
    if bits == 4:
        own = attention.held(own=True)
        for got, want in zip(own, (*naive.quantize_int8(k), *naive.quantize_int8(v)), strict=True):
            np.testing.assert_array_equal(got, want)
    size = head_dim & -head_dim
    expected = naive.hadamard(naive.attention_8bit(q / F32(size), *held, window, own=own)) / size
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


@pytest.mark.parametrize("bits", KV_FORMATS)
@pytest.mark.parametrize("window", [None, 3000])
def test_threads_may_share_splits(bits, window):
    """Behind a long cache, the splits of a few tokens are computed one by one. Their merged result has the same bits."""
    rng, split = np.random.default_rng(bits), POSITIONS * SPLIT_BLOCKS
    length = 2 * split + 100
    attention = Attention(bits, 32, 2, 1, window, positions=length + 100)
    qkv = random_qkv(rng, length, attention.config, spread=1.0)
    exact = attention.exact(qkv)
    outs, rng = [], np.random.default_rng(0)
    while attention.length < length:
        left = min(abs(border - attention.length) for border in (split, 2 * split, split + 3000, 2 * split + 100)) + 1
        part = qkv[attention.length :][: rng.integers(1, min(left, 250) + 1)]       # small steps near the borders
        whole = attention.append(part.copy(), shared=False)
        attention.length -= len(part)
        outs.append(attention.append(part.copy()))
        np.testing.assert_array_equal(outs[-1], whole)
    assert relative_error(np.concatenate(outs), exact) < {4: 0.2, 8: 0.02, 16: 1e-3}[bits]
