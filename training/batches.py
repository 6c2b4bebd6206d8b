"""What the demo model is trained on, without end: windows of prose, and conversations of conversations.py.

A batch is a pair of int64 tensors (rows, length): ids, and for each position the id to be predicted or IGNORED.
Prose is learned word for word; of a conversation only what the assistant says, unless it has `"learn": False`.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgemistral.text.tokenizer import Tokenizer
from training.conversations import conversations

IGNORED = -100
POOL = 1024   # conversations that are sorted by length before they are cut into batches: little padding
STEP = 16     # lengths are multiples of this: PyTorch compiles its products anew for every shape, half of the time otherwise
BYTE_ORDER_MARK = "\ufeff"   # joined e-books carry some in the middle
Batch = tuple[Tensor, Tensor]


def paragraphs(path: Path) -> Iterator[str]:
    """The lines of a text, .txt or .txt.xz, that hold something."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from filter(None, (line.replace(BYTE_ORDER_MARK, "").strip() for line in file))


def encode_prose(path: Path, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """Token ids uint16 of a whole text, paragraphs separated by line feeds; kept in the file `cache`."""
    if not cache.exists():
        ids: list[np.ndarray] = []
        lines = paragraphs(path)
        while piece := "\n".join(islice(lines, 1000)):
            ids.append(np.array(tokenizer.encode(piece + "\n"), np.uint16))
        partial = cache.with_suffix(".partial")
        np.concatenate(ids).tofile(partial)
        partial.replace(cache)
    return np.memmap(cache, np.uint16, "r")


def prose_batch(ids: np.ndarray, rows: int, length: int, bos_id: int, rng: np.random.Generator) -> Batch:
    """Windows from anywhere, each after a <s>."""
    starts = rng.integers(0, len(ids) - length, rows)
    windows = np.stack([ids[start : start + length].astype(np.int64) for start in starts])
    inputs = np.concatenate([np.full((rows, 1), bos_id), windows[:, :-1]], axis=1)
    return torch.from_numpy(inputs), torch.from_numpy(windows)


def encode_conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation, and which of them are to be learned."""
    ids: list[int] = []
    own: list[bool] = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.encode_chat(messages[:n])[len(ids):]
            answer = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
            ids += [*prompt, *answer]
            own += [False] * len(prompt) + [message.get("learn", True)] * len(answer)
    return ids, own


def chat_pool(seed: int, tokenizer: Tokenizer, batch_tokens: int, longest: int, split: str = "train") -> list[Batch]:
    """POOL conversations, of at most `longest` tokens each, as batches of conversations of like length."""
    encoded = (encode_conversation(messages, tokenizer) for messages in islice(conversations(seed, split), POOL))
    pool = sorted((each for each in encoded if len(each[0]) <= longest), key=lambda each: len(each[0]))
    batches = []
    while pool:
        length = -(-len(pool[-1][0]) // STEP) * STEP
        pool, taken = pool[: -max(1, batch_tokens // length)], pool[-max(1, batch_tokens // length):]
        ids = np.zeros((len(taken), length), np.int64)
        targets = np.full((len(taken), length), IGNORED)
        for row, (tokens, own) in enumerate(taken):
            ids[row, : len(tokens)] = tokens
            targets[row, : len(tokens) - 1] = np.where(own, tokens, IGNORED)[1:]
        batches.append((torch.from_numpy(ids), torch.from_numpy(targets)))
    order = np.random.default_rng(seed).permutation(len(batches))
    return [batches[n] for n in order]
