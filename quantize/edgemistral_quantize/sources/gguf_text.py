"""Reads the text part of a GGUF file: tokenizer (as a tokenizer.json or a SentencePiece model), chat template, ends of turn."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemistral.errors import BadCheckpoint
from edgemistral.text.chat import JinjaTemplate, end_of_turn, is_mistrals_own
from edgemistral.text.spec import TextSpec
from edgemistral.text.tokenizer import Tokenizer
from edgemistral_quantize.text_files import TextFiles, read_template

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6   # tokenizer.ggml.token_type
END_NAMES = ("eos_token_id", "eot_token_id", "eom_token_id")
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")

# How a text is split before byte pairs are merged, by `tokenizer.ggml.pre`; ByteLevel splits the parts again.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_LIKE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
SMOLLM_LIKE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")   # every digit is a word
GPT2_LIKE = ("gpt-2", "default", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "roberta-bpe", "gigachat")


def read_text(metadata: Mapping[str, Any], path: Path, chat_template: Path | None = None) -> TextFiles:
    """The metadata about text; `chat_template` is a file that replaces its template.

    BadCheckpoint names a field that is missing or not supported; BadInput: an error in the tokenizer.
    """
    get = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}.get
    kind, tokens = get("model"), get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BadCheckpoint("tokenizer.ggml.tokens is missing: a GGUF file without a tokenizer cannot be used")
    pieces = [token.decode("utf-8", "replace") for token in tokens]
    types = get("token_type")
    types = _guessed_types(pieces, get) if types is None else [int(each) for each in types]
    if len(types) != len(pieces):
        raise BadCheckpoint(f"tokenizer.ggml.token_type has {len(types)} entries for {len(pieces)} tokens")
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    ends = [get(name) for name in END_NAMES]
    ends += [ids[text] for text in ENDS if text in ids and types[ids[text]] in (CONTROL, USER_DEFINED)]
    ends = [token_id for token_id in ends if token_id is not None]
    bos_id = get("bos_token_id")
    for name, token_id in (("eos_token_id", ends[0] if ends else 0), ("bos_token_id", 0 if bos_id is None else bos_id)):
        if type(token_id) is not int or not 0 <= token_id < len(pieces):
            raise BadCheckpoint(f"tokenizer.ggml.{name} is {token_id!r}, outside the vocabulary of {len(pieces)}")
    if not ends:
        raise BadCheckpoint("tokenizer.ggml.eos_token_id is missing: the end of an answer is unknown")
    end_ids = [each for each in dict.fromkeys(ends) if type(each) is int and 0 <= each < len(pieces)]
    spec = TextSpec(
        special={"eos_token": pieces[end_ids[0]]} | ({} if bos_id is None else {"bos_token": pieces[bos_id]}), legacy=False
    )
    if kind == "gpt2":
        data = _byte_level(pieces, types, get("merges"), get("pre", "default"))
        adds_bos = get("add_bos_token", get("pre") in LLAMA3_LIKE or get("pre") == "tekken") is True and bos_id is not None
        spec = dataclasses.replace(spec, kind="tokenizers", bos_id=bos_id, adds_bos=adds_bos)
        eos_id: int | None = end_ids[0]
    elif kind == "llama":
        scores = get("scores")
        if scores is None or len(scores) != len(pieces):
            raise BadCheckpoint("tokenizer.ggml.scores is missing or of another length than tokenizer.ggml.tokens")
        data, added = _sentencepiece(pieces, types, [float(each) for each in scores], get)
        spec = dataclasses.replace(spec, added=added, adds_bos=get("add_bos_token", True) is True)
        eos_id = None
    else:
        raise BadCheckpoint(f"tokenizer.ggml.model is {str(kind)[:40]!r}; supported: 'gpt2' and 'llama'")
    template = metadata.get("tokenizer.chat_template") if chat_template is None else read_template(chat_template)
    if template is not None and not isinstance(template, str):
        raise BadCheckpoint("tokenizer.chat_template is not a text")
    if template is not None and not template.strip():
        template = None
    tokenizer = spec.tokenizer(data, None, "its tokenizer", eos_id)
    return TextFiles(_with_template(spec, template, tokenizer, end_ids), data, path, tokenizer.bos_id, tokenizer.eos_id)


def _guessed_types(pieces: list[str], get: Any) -> list[int]:
    """Token types for a file of an old converter, which has none."""
    types = [BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL for piece in pieces]
    for name, kind, default in (("unknown_token_id", UNKNOWN, 0), ("bos_token_id", CONTROL, 1), ("eos_token_id", CONTROL, 2)):
        token_id = get(name, default)
        if type(token_id) is int and 0 <= token_id < len(pieces):
            types[token_id] = kind
    return types


def _with_template(spec: TextSpec, template: str | None, tokenizer: Tokenizer, ends: list[int]) -> TextSpec:
    """Add the template and the ends of turn; Mistral's own template is built in."""
    if template is not None:
        JinjaTemplate(template, spec.special)   # raises BadInput
        if not tokenizer.bytes_split_characters and is_mistrals_own(template, spec.special):
            template = None
        else:
            turn_end = end_of_turn(template, spec.special, {text: n for n, text in tokenizer.markup.items()})
            ends = [*([] if turn_end is None else [turn_end]), *ends]
    return dataclasses.replace(
        spec, chat_template=template, special=spec.special if template is not None else {},
        end_ids=() if set(ends) <= {tokenizer.eos_id} else tuple(dict.fromkeys(ends)),
        turn_end_id=None if ends[0] == tokenizer.eos_id else ends[0],
    )


def _byte_level(pieces: list[str], types: list[int], merges: Any, pre: Any) -> bytes:
    """A tokenizer.json for Hugging Face's tokenizers library: byte-level BPE."""
    if not isinstance(merges, list):
        raise BadCheckpoint("tokenizer.ggml.merges is missing")
    pairs = [merge.decode("utf-8", "replace").split(" ", 1) for merge in merges]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise BadCheckpoint(f"tokenizer.ggml.merges has {bad[0][:40]!r}, which is not two tokens")
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise BadCheckpoint("tokenizer.ggml.tokens has the same token twice")
    if bad := next((pair for pair in pairs if not {pair[0], pair[1], pair[0] + pair[1]} <= vocabulary.keys()), None):
        raise BadCheckpoint(f"tokenizer.ggml.merges has {' '.join(bad)[:80]!r}, whose tokens are not all in the vocabulary")
    added = [
        {"id": n, "content": pieces[n], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for n, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNKNOWN) and pieces[n]
    ]
    described = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _cuts(pre)},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                            "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre in LLAMA3_LIKE or pre == "tekken", "vocab": vocabulary, "merges": pairs,
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def _cuts(pre: Any) -> list[dict[str, Any]]:
    """The pre-tokenizers for llama.cpp's name `pre`."""
    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pre in SMOLLM_LIKE:
        return [{"type": "Digits", "individual_digits": True}, {**whole, "use_regex": True}]
    if pre in GPT2_LIKE:
        return [{**whole, "use_regex": True}]
    if pre in LLAMA3_LIKE or pre == "tekken":
        return [split(TEKKEN if pre == "tekken" else LLAMA3), whole]
    supported = ", ".join((*GPT2_LIKE[:2], *SMOLLM_LIKE[:2], *LLAMA3_LIKE[:2], "tekken"))
    raise BadCheckpoint(f"tokenizer.ggml.pre is {str(pre)[:40]!r}; supported: {supported} and those like them")


def _sentencepiece(
    pieces: list[str], types: list[int], scores: list[float], get: Any
) -> tuple[bytes, tuple[tuple[int, str, bool], ...]]:
    """A SentencePiece model, and the tokens added after it (id, text, whether it is a control token).

    All tokens after the last ordinary or byte piece were added later.
    """
    last = max((n for n, kind in enumerate(types) if kind in (NORMAL, BYTE)), default=-1)
    added = tuple((n, pieces[n], types[n] == CONTROL) for n in range(last + 1, len(pieces)) if types[n] != UNUSED)
    seen: set[str] = set()
    written = []
    for piece, kind, score in zip(pieces[: last + 1], types, scores, strict=False):
        if not piece or piece in seen:
            raise BadCheckpoint(f"tokenizer.ggml.tokens has {piece[:40]!r} twice or an empty token")
        seen.add(piece)
        written.append(_bytes(1, _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)))
    trainer = _number(3, 2) + _number(4, last + 1) + _number(35, any(kind == BYTE for kind in types))   # 2: BPE
    for n, (name, default) in enumerate((("unknown", 0), ("bos", 1), ("eos", 2), ("padding", -1))):
        token_id = get(f"{name}_token_id", default)
        inside = type(token_id) is int and 0 <= token_id <= last and types[token_id] in (CONTROL, UNKNOWN)
        trainer += _number(40 + n, token_id if inside else 0 if name == "unknown" else -1)
        trainer += _bytes(45 + n, pieces[token_id].encode()) if inside else b""
    normalizer = _bytes(1, b"identity") + _number(3, get("add_space_prefix", True) is True)
    normalizer += _number(4, get("remove_extra_whitespaces", False) is True) + _number(5, True)
    model = b"".join(written) + _bytes(2, trainer) + _bytes(3, normalizer)
    return model, added


def _number(field: int, value: int) -> bytes:
    """A field of a protocol buffer's message, as sentencepiece_model.proto numbers them."""
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
