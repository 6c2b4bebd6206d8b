"""Converts tekken.json, the tokenizer of Mistral's models since Nemo, to a tokenizer.json. The reference is mistral-common.

A tekken.json lists its tokens by rank, as tiktoken does: of all neighbours that together are a token, those with the lowest
rank are merged first. A tokenizer.json lists pairs instead. Every way to split a token into two others becomes a pair, in the
order of the tokens' ranks, so the same pairs are merged. Ids of ordinary tokens follow those of the special ones.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemistral.errors import BadCheckpoint
from edgemistral.files import strict_json
from edgemistral.text.bpe import BYTES

NAME = "tekken.json"
VERSIONS = {"v3": 3, "v7": 7, "v11": 7, "v13": 7}     # of files: the version of Mistral's template, when no tools are given
MARKS = {3: {"[INST]", "[/INST]"}, 7: {"[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"}}     # that a template needs
MAX_TOKENS = 1 << 20
SPECIAL = (      # of files that do not list theirs
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Tekken:
    """described: the tokenizer.json. version: from the file."""

    described: bytes
    version: str


def read_tekken(path: Path, data: bytes) -> Tekken:
    """The content of a tekken.json. BadCheckpoint names what is wrong with it."""
    fields = strict_json.parse(data, str(path), BadCheckpoint)
    config = fields.get("config") if isinstance(fields, dict) else None
    vocab = fields.get("vocab") if isinstance(fields, dict) else None
    if not isinstance(config, dict) or not isinstance(vocab, list):
        raise BadCheckpoint(f"{path}: not a tekken.json: config and vocab are missing")
    pattern, size, n_special = (config.get(name) for name in ("pattern", "default_vocab_size", "default_num_special_tokens"))
    if not isinstance(pattern, str):
        raise BadCheckpoint(f"{path}: config.pattern is not a text")
    if type(size) is not int or type(n_special) is not int or not 0 < n_special < size <= MAX_TOKENS:
        raise BadCheckpoint(f"{path}: config says {size!r:.20} tokens, {n_special!r:.20} of them special")
    if len(vocab) < size - n_special:
        raise BadCheckpoint(f"{path}: vocab has {len(vocab)} tokens, config asks for {size - n_special}")
    ranks = _ranks(path, vocab[: size - n_special])
    special = _special(path, fields.get("special_tokens"), n_special)
    visible = {byte: character for character, byte in BYTES.items()}

    def spelled(token: bytes) -> str:
        return "".join(visible[token[n : n + 1]] for n in range(len(token)))

    described = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": n, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": control} for n, (text, control) in enumerate(special)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {text: n for n, (text, _) in enumerate(special)} |
                     {spelled(token): n_special + rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in _pairs(ranks)],
        },
    }
    return Tekken(json.dumps(described, ensure_ascii=False).encode(), str(config.get("version"))[:20])


def _ranks(path: Path, vocab: list[Any]) -> dict[bytes, int]:
    """Tokens -> their ranks; the first 256 are the bytes."""
    ranks: dict[bytes, int] = {}
    for rank, item in enumerate(vocab):
        try:
            token = base64.b64decode(item["token_bytes"], validate=True)
        except (TypeError, KeyError, ValueError, binascii.Error):
            token = b""
        if not token or item.get("rank") != rank or token in ranks or (rank < 256 and token != bytes([rank])):
            raise BadCheckpoint(f"{path}: vocab[{rank}] is {str(item)[:60]}: not the token of that rank")
        ranks[token] = rank
    if len(ranks) < 256:
        raise BadCheckpoint(f"{path}: vocab lacks some of the 256 bytes")
    return ranks


def _pairs(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that together are a token, in the order in which they are merged."""
    pairs = []
    for token in ranks:                                  # by rank
        splits = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in ranks and token[n:] in ranks]
        pairs += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def _special(path: Path, listed: Any, n: int) -> list[tuple[str, bool]]:
    """The text of each special token, and whether it is a control token. Tokens without a name are named by a number."""
    if listed is None:
        found = [(text, True) for text in SPECIAL]
    else:
        found = []
        for rank, item in enumerate(listed if isinstance(listed, list) else [None]):
            text = item.get("token_str") if isinstance(item, Mapping) else None
            if not isinstance(text, str) or not text or item.get("rank") != rank:
                raise BadCheckpoint(f"{path}: special_tokens[{rank}] is {str(item)[:60]}: not the token of that rank")
            found.append((text, item.get("is_control") is not False))
    found += [(f"<SPECIAL_{rank}>", True) for rank in range(len(found), n)]
    if len(found) > n or len({text for text, _ in found}) < n or not {BOS, EOS} <= {text for text, _ in found}:
        raise BadCheckpoint(f"{path}: special_tokens has a text twice, lacks <s> or </s>, or is longer than its config's {n}")
    return found
