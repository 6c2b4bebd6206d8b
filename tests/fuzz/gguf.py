"""GGUF files: fields, tensors and raw bytes."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.files import OfFiles
from tests.fuzz.harness import Failed

FORMS = {"u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "i32": (5, "<i"), "u8": (0, "<B")}


class Gguf(OfFiles):
    name = "gguf"
    planted = "counts are not compared with the size of the file (gguf_header._Reader.check)"

    def prepare(self) -> None:
        super().prepare()
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"abcdefghijklmnopqrstuvwxyz▁", "ab", "▁a"]
        types = [2, 3, 3, *[6] * 256, *[1] * 29]
        n, dim = len(pieces), 32
        self.fields = [
            ["general.architecture", "text", "llama"], ["llama.embedding_length", "u32", dim], ["llama.block_count", "u32", 1],
            ["llama.attention.head_count", "u32", 1], ["llama.attention.head_count_kv", "u32", 1],
            ["llama.feed_forward_length", "u32", dim], ["llama.context_length", "u32", 512],
            ["llama.attention.layer_norm_rms_epsilon", "f32", 1e-5], ["llama.rope.freq_base", "f32", 1e4],
            ["llama.rope.dimension_count", "u32", dim], ["llama.vocab_size", "u32", n],
            ["tokenizer.ggml.model", "text", "llama"],
            ["tokenizer.ggml.tokens", "texts", pieces], ["tokenizer.ggml.scores", "f32s", [-float(i) for i in range(n)]],
            ["tokenizer.ggml.token_type", "i32s", types], ["tokenizer.ggml.bos_token_id", "u32", 1],
            ["tokenizer.ggml.eos_token_id", "u32", 2], ["tokenizer.ggml.add_bos_token", "bool", True],
            ["tokenizer.chat_template", "text", "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"],
            ["general.alignment", "u32", 32],
        ]
        parts = {"attn_norm": [dim], "ffn_norm": [dim]} | {
            name: [dim, dim] for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")}
        shapes = {"token_embd": [dim, n], "output_norm": [dim], "output": [dim, n]} | {f"blk.0.{k}": v for k,
            v in parts.items()}
        self.tensors, self.size = [], 0
        for name, shape in shapes.items():
            self.tensors.append([f"{name}.weight", shape, 0, self.size])
            self.size += 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        self.start()
        if self.run({"version": 3, "fields": self.fields, "tensors": self.tensors, "counts": [0, 0], "size": 0,
            "raw": 0}) != "opened":
            raise AssertionError("the seed is not taken")

    def make(self, chance: Random) -> Any:
        given = {"version": chance.choice((3,) * 9 + (2, 1, 4, 1 << 24)), "fields": self.fields, "tensors": self.tensors,
                 "counts": [0, 0], "size": 0, "raw": 0}
        kind = chance.randrange(6)
        if kind <= 2:
            small = [field for field in self.fields if not isinstance(field[2], list)]
            long = [field for field in self.fields if isinstance(field[2], list)]
            if chance.random() < 0.3:
                field = chance.choice(long)
                long[long.index(field)] = [*field[:2], mutate.value(chance, field[2])]
            given["fields"] = [*mutate.value(chance, small), *long]
        if kind in (2, 3):
            given["tensors"] = mutate.value(chance, self.tensors)
        if kind == 4:
            given["counts"] = [chance.choice(mutate.INTEGERS) % 2**64 for _ in range(2)]
        if kind == 5:
            given["raw"] = chance.randrange(1, 2**32)
        if chance.random() < 0.1:
            given["size"] = chance.choice((-1, -32, -(10**6), 32))
        return given

    def run(self, given: Any) -> str:
        from edgemistral_quantize.checkpoint import Checkpoint

        head = encode(given)
        if given["raw"]:
            head = mutate.data(Random(given["raw"]), head)
        path = self.work / "model.gguf"
        size = max(0, (len(head) + 31) // 32 * 32 + self.size + given["size"])
        path.write_bytes(head[:size])
        with path.open("r+b") as file:
            file.truncate(size)
        checkpoint = Checkpoint(path)
        for strip in checkpoint.strips("layers.0.wqkv", 1 << 16):
            if not strip.nbytes:
                raise Failed("an empty strip")
        return "opened"

    def plant(self) -> None:
        from edgemistral_quantize.sources import gguf_header

        gguf_header._Reader.check = lambda self, n, what: None


def encode(given: dict[str, Any]) -> bytes:
    fields = [field for field in given["fields"] if isinstance(field, list) and len(field) == 3]
    tensors = [tensor for tensor in given["tensors"] if isinstance(tensor, list) and len(tensor) == 4]
    counts = [len(tensors) + given["counts"][0], len(fields) + given["counts"][1]]
    made = b"GGUF" + struct.pack("<IQQ", given["version"], *(count % 2**64 for count in counts))
    for key, kind, value in fields:
        made += _text(key) + _value(kind, value)
    for name, shape, kind, offset in tensors:
        shape = shape if isinstance(shape, list) else [shape]
        made += _text(name) + struct.pack("<I", len(shape)) + b"".join(_packed("<Q", length) for length in shape)
        made += _packed("<I", kind) + _packed("<Q", offset)
    return made


def _text(text: Any) -> bytes:
    data = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _packed(form: str, value: Any) -> bytes:
    size = struct.calcsize(form)
    try:
        if form in ("<f", "<?"):
            return struct.pack(form, value)
        return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    except (TypeError, ValueError, OverflowError, struct.error):
        return b"\xff" * size


def _value(kind: Any, value: Any) -> bytes:
    if isinstance(value, list):
        item = str(kind).removesuffix("s")
        if item in FORMS:
            number, form = FORMS[item]
            return struct.pack("<IIQ", 9, number, len(value)) + b"".join(_packed(form, one) for one in value)
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if str(kind) in FORMS:
        number, form = FORMS[str(kind)]
        return struct.pack("<I", number) + _packed(form, value)
    return struct.pack("<I", 8 if kind == "text" else 77) + _text(value)
