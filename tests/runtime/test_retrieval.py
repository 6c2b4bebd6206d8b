"""A model that is crafted to find one token among all that it has read, by attention alone, with every KV format.

Its tokens are cards and questions. A card has a key and a value, a question a key. One layer of one head looks for the card
whose key a question has, and the output names its value. Keys are random signs, so cards with other keys score about
nothing; the question's strength is such that the right card gets nearly all of the attention among 30,000.
"""

from __future__ import annotations

import numpy as np
import pytest
from edgemistral_quantize import quantize

from edgemistral.config import ModelConfig
from edgemistral.files.blob import Blob
from edgemistral.runtime.segments import KV_BITS, Row, Sequence
from edgemistral.runtime.transformer import Transformer
from tests import naive
from tests.checkpoints import TOKENIZER, write_hf

F32 = np.float32
CARDS, VALUES = 2048, 32       # card n has key n; its value is one of so many
KEY_DIMS, TURNING = 96, 16     # the fastest 16 of the 64 rotary pairs turn within 30,000 positions and stay empty
CONFIG = ModelConfig(
    dim=256, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=128, hidden_dim=128, vocab_size=2 * CARDS + VALUES, context=32768,
    norm_eps=1e-5, rope_theta=1e30, sliding_window=None, bos_id=1, eos_id=2,
)
STRENGTH = 18                  # score of the card that is asked for; all others' weights sum up to some e**12


def crafted(rng):
    """(weights, value of each card). Ids: cards, then questions, then values, which only answers have."""
    c, keys = CONFIG, rng.choice([-1, 1], (CARDS, KEY_DIMS)).astype(F32)
    codes, values = rng.choice([-1, 1], (VALUES, 64)).astype(F32), rng.integers(0, VALUES, CARDS)
    embeddings = np.zeros((c.vocab_size, c.dim), F32)
    embeddings[:CARDS, :KEY_DIMS], embeddings[:CARDS, KEY_DIMS:160] = keys, codes[values]
    embeddings[CARDS : 2 * CARDS, 160:] = keys
    embeddings[2 * CARDS :, KEY_DIMS:160] = codes
    slow = [i for i in range(c.head_dim) if i % 64 >= TURNING]
    card_norm, question_norm = (160 / c.dim) ** 0.5, (KEY_DIMS / c.dim) ** 0.5     # of RMSNorm
    wq, wk, wv, wo = (np.zeros(shape, F32) for shape in ((128, 256), (128, 256), (128, 256), (256, 128)))
    wq[slow, 160 + np.arange(KEY_DIMS)] = STRENGTH * c.head_dim**0.5 / KEY_DIMS * question_norm
    wk[slow, np.arange(KEY_DIMS)] = card_norm
    wv[np.arange(64), KEY_DIMS + np.arange(64)] = card_norm
    wo[KEY_DIMS + np.arange(64), np.arange(64)] = 1
    output = np.zeros((c.vocab_size, c.dim), F32)
    output[2 * CARDS :, KEY_DIMS:160] = codes / 8
    at, none = "layers.0.", np.zeros((128, 256), F32)
    weights = {
        "tok_embeddings": embeddings, at + "attention_norm": np.ones(256, F32), at + "ffn_norm": np.ones(256, F32),
        at + "wq": wq, at + "wk": wk, at + "wv": wv, at + "wo": wo, at + "w1": none, at + "w3": none, at + "w2": none.T.copy(),
        "norm": np.ones(256, F32), "output": output,
    }
    return weights, values


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path of the blob, value of each card)."""
    folder = tmp_path_factory.mktemp("retrieval")
    weights, values = crafted(np.random.default_rng(0))
    write_hf(folder / "checkpoint", CONFIG, weights)
    (folder / "checkpoint" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return quantize(folder / "checkpoint", folder / "blob", bits=8, progress=False), values


def answers(path, text, questions, kv_bits):
    """Logits (questions, vocab_size) of each question after the whole text."""
    transformer = Transformer(Blob.open(path), kv_bits=kv_bits)
    sequence, logits = Sequence(transformer.pool), []
    for at in range(0, len(text), transformer.chunk):
        transformer.step([Row(sequence, text[at : at + transformer.chunk], 0)])
    for question in questions:
        logits.append(transformer.step([Row(sequence, np.array([question], np.int32), 1)])[0].copy())
        sequence.cut(len(text))
    transformer.close()
    return np.stack(logits)


@pytest.mark.parametrize("length", [1_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_every_format_finds_what_the_reference_finds(model, length):
    """A card that was there once, 30,000 positions back or anywhere; only the cards asked for stand there once."""
    path, values = model
    rng = np.random.default_rng(length)
    asked = rng.choice(np.arange(3, CARDS), 48, replace=False)
    others = np.setdiff1d(np.arange(3, CARDS), asked)
    text = rng.choice(others, length).astype(np.int32)
    text[np.append(0, rng.choice(np.arange(1, length), len(asked) - 1, replace=False))] = asked
    expected = 2 * CARDS + values[asked]
    logits = {kv_bits: answers(path, text, CARDS + asked, kv_bits) for kv_bits in KV_BITS}
    for found in logits.values():
        np.testing.assert_array_equal(found.argmax(axis=1), expected)
    kl = {kv_bits: naive.mean_kl(logits[16], logits[kv_bits]) for kv_bits in (4, 8)}
    assert kl[8] < 1e-3 and kl[4] < 0.05, kl

    blind = np.where(np.isin(text, asked), others[0], text).astype(np.int32)     # the test can fail
    assert (answers(path, blind, CARDS + asked, 8).argmax(axis=1) == expected).mean() < 0.3


def test_the_crafted_model_is_an_ordinary_one():
    """The float32 reference answers likewise, so the figures above are about the cache and not about the model."""
    rng = np.random.default_rng(1)
    weights, values = crafted(np.random.default_rng(0))
    text = rng.choice(np.arange(3, CARDS), 200, replace=False)
    ids = np.append(text, CARDS + text[0])
    logits = naive.forward(weights, CONFIG, ids, at=[200])
    assert logits[0].argmax() == 2 * CARDS + values[text[0]]
