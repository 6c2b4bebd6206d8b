"""Model files, checkpoint folders and adapters."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Failed, Harness

TEXT = "What should I see in Paris?"


def scratch() -> Path:
    """A folder in memory where the system has one."""
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


class OfFiles(Harness):
    """`folder`: where prepared files lie; `work`: of the child."""

    def prepare(self) -> None:
        self.folder = scratch()

    def start(self) -> None:
        self.work = self.folder / f"work-{os.getpid()}"
        self.work.mkdir(exist_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The fields of a safetensors header, and the rest of the file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def spoil_header(chance: Random, fields: dict[str, Any]) -> dict[str, Any]:
    """{"text", "length", "cut"}: a header's text, what is added to its length, what is added to the file's size."""
    text = mutate.as_text(chance, mutate.value(chance, fields) if chance.random() < 0.9 else fields)
    return {
        "text": text,
        "length": chance.choice((0,) * 12 + (1, -1, 8, 2**24, 2**40, 2**63)),
        "cut": chance.choice((0,) * 8 + (1, -1, -64, 64, -(10**9))),
    }


def write_spoilt(path: Path, given: dict[str, Any], rest: bytes, align: int = 1, digest: Any = None) -> None:
    text = given["text"].encode("utf-8", "surrogatepass")
    text += b" " * (-(8 + len(text)) % align)
    if digest is not None:
        text = digest(text)
    length = (len(text) + given["length"]) % 2**64
    data = length.to_bytes(8, "little") + text + rest
    data = data[: max(0, len(data) + given["cut"])] if given["cut"] < 0 else data + b"\0" * given["cut"]
    path.write_bytes(data)


class Blobs(OfFiles):
    """A model file: its header, its fields, its tensors' bytes; what opens is run."""

    name = "blob"
    planted = "shapes and offsets are any values (files.safetensors._are_counts)"

    def prepare(self) -> None:
        super().prepare()
        from edgemistral.files.blob import Blob
        from edgemistral.files.layout import Recipe
        from tests.blobs import config, write_blob
        from tests.checkpoints import TOKENIZER

        self.seeds = []
        shape = {"dim": 32, "n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "hidden_dim": 32, "n_layers": 1, "vocab_size": 2053}
        for bits in (4, 8):
            path = write_blob(self.folder / f"q{bits}", config(**shape), Recipe(bits, bits), TOKENIZER.read_bytes())
            with Blob.open(path) as blob:
                self._forward(blob)                    # compiles
                tensors = blob.tensors
            fields, rest = header_of(path)
            inner = {key: json.loads(fields["__metadata__"].pop(key)) for key in ("config", "recipe", "text")}
            self.seeds.append((fields, inner, rest, tensors))

    def make(self, chance: Random) -> Any:
        number = chance.randrange(2)
        fields, inner, rest, _ = self.seeds[number]
        kind = chance.randrange(4)
        fields = json.loads(json.dumps(fields))
        if kind == 0:
            inner = mutate.value(chance, inner)
        elif kind == 1:
            inner = {**inner, "text": {**inner["text"], **mutate.value(chance, FULL_TEXT)}}
        if isinstance(inner, dict):
            for name, value in inner.items():
                fields["__metadata__"][name] = mutate.as_text(chance, value) if chance.random() < 0.2 else json.dumps(value)
        given = {"seed": number, "sealed": chance.random() < 0.9, "text": json.dumps(fields), "length": 0, "cut": 0,
            "flips": []}
        if kind == 2:
            given |= spoil_header(chance, fields)
        if kind == 3 or chance.random() < 0.1:
            given["flips"] = [[chance.randrange(len(rest)), chance.randrange(256)] for _ in range(chance.choice((1, 10, 1000)))]
        return given

    def run(self, given: Any) -> str:
        from edgemistral.files.blob import Blob
        from edgemistral.model import tokenizer_of
        from edgemistral.runtime.plan import plan

        _, _, rest, tensors = self.seeds[given["seed"]]
        if given["flips"]:
            changed = bytearray(rest)
            for at, value in given["flips"]:
                changed[at] = value
            rest = bytes(changed)
        path = self.work / "model"
        write_spoilt(path, given, rest, 64, _sealed if given["sealed"] else None)
        with Blob.open(path) as blob:
            if blob.data.nbytes != path.stat().st_size:
                raise Failed("a mapping of another size")
            plan(blob, None, 8, 1, None, None)
            tokenizer = tokenizer_of(blob)
            tokenizer.encode(TEXT)
            tokenizer.decode(range(min(tokenizer.vocab_size, 300)))
            if blob.tensors == tensors and blob.config.context < 1 << 16:
                self._forward(blob)
                return "ran"
        return "opened"

    def _forward(self, blob: Any) -> None:
        import numpy as np

        from edgemistral.runtime.segments import Row, Sequence
        from edgemistral.runtime.transformer import Transformer

        transformer = Transformer(blob, threads=1, kv_budget=1 << 20)
        sequence = Sequence(transformer.pool)
        logits = transformer.step([Row(sequence, np.array([1, 5, 7]), 1)])
        if logits.shape != (1, blob.config.vocab_size):
            raise Failed("logits of another shape")
        sequence.close()
        transformer._team.close()
        transformer.pool.close()

    def plant(self) -> None:
        from edgemistral.files import safetensors

        safetensors._are_counts = lambda values: True


FULL_TEXT = {
    "kind": "sentencepiece", "added": [[2048, "<|im_end|>", True], [2049, "  ", False]], "chat_template": "{{ messages }}",
    "tool_template": None, "special": {"bos_token": "<s>"}, "bos_id": 1, "adds_bos": True, "legacy": True, "end_ids": [2, 2048],
    "turn_end_id": 2048, "defaults": {"temperature": 0.7, "top_p": 0.9},
}


def _sealed(text: bytes) -> bytes:
    """With the checksum of the header itself."""
    key = b'"header_sha256":'
    at = text.find(key)
    if at < 0:
        return text
    at = text.find(b'"', at + len(key)) + 1
    blank = text[:at] + b"0" * 64 + text[at + 64 :]
    return text[:at] + hashlib.sha256(blank).hexdigest().encode() + text[at + 64 :]


OTHERS = ("fifo", "loop", "folder", "nothing", "dangling", "empty", "html", "lfs", "pickle", "zeros", "device")


def put_other(path: Path, kind: str) -> None:
    """Something that is no such file."""
    path.unlink(missing_ok=True)
    contents = {"empty": b"", "html": b"<!DOCTYPE html><html>", "lfs": b"version https://git-lfs.github.com/spec/v1\n",
                "pickle": b"\x80\x02}q\0.", "zeros": bytes(5000)}
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to({"loop": path, "dangling": path.parent / "missing", "device": Path("/dev/zero")}[kind])


class Checkpoints(OfFiles):
    """A checkpoint folder of either layout: each of its files' contents, headers, and kinds."""

    name = "checkpoint"
    planted = "JSON is parsed without checks (files.strict_json.parse)"

    def prepare(self) -> None:
        super().prepare()
        from edgemistral_quantize.checkpoint import Checkpoint

        from tests.checkpoints import random_weights, small_config, write_hf, write_mistral

        config = small_config(dim=32, n_heads=1, n_kv_heads=1, hidden_dim=32, n_layers=1)
        weights = random_weights(config)
        self.seeds = [write_hf(self.folder / "hf", config, weights, shards=2),
            write_mistral(self.folder / "mistral", config, weights)]
        extra = {
            "tokenizer_config.json": {"legacy": False, "add_bos_token": True, "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
                                      "added_tokens_decoder": {"2048": {"content": "<|im_end|>", "special": True}},
                                      "chat_template": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"},
            "special_tokens_map.json": {"unk_token": "<unk>"}, "added_tokens.json": {"<|a|>": 2049},
            "generation_config.json": {"eos_token_id": [2, 2048], "temperature": 0.5, "top_k": 40, "do_sample": True},
        }
        for name, fields in extra.items():
            (self.seeds[0] / name).write_text(json.dumps(fields))
        for seed in self.seeds:
            Checkpoint(seed)

    def make(self, chance: Random) -> Any:
        number = chance.randrange(2) if chance.random() < 0.5 else 0
        changes = {}
        names = sorted(path.name for path in self.seeds[number].iterdir())
        for name in chance.sample(names, chance.choice((1, 1, 1, 2))):
            path = self.seeds[number] / name
            if chance.random() < 0.15:
                changes[name] = {"kind": chance.choice(OTHERS)}
            elif name.endswith(".safetensors"):
                changes[name] = spoil_header(chance, header_of(path)[0])
            elif name.endswith(".json"):
                changes[name] = {"json": mutate.as_text(chance, mutate.value(chance, json.loads(path.read_text())))}
        extra = {chance.choice(("chat_template.jinja", "tokenizer.json", "model.safetensors", "params.json", "x.gguf",
                                "adapter_config.json")): {"kind": chance.choice(OTHERS)}}
        return {"seed": number, "changes": {**changes, **(extra if chance.random() < 0.1 else {})}}

    def run(self, given: Any) -> str:
        from edgemistral_quantize.checkpoint import Checkpoint

        folder = laid_out(self.work / "checkpoint", self.seeds[given["seed"]], given["changes"])
        checkpoint = Checkpoint(folder)
        for name in ("layers.0.wqkv", "norm"):
            for strip in checkpoint.strips(name, 1 << 16):
                if not strip.nbytes:
                    raise Failed("an empty strip")
        return "opened"

    def plant(self) -> None:
        from edgemistral.files import strict_json

        strict_json.parse = lambda text, where, error: json.loads(text)


def laid_out(folder: Path, seed: Path, changes: dict[str, Any]) -> Path:
    """A copy of a folder, of links, with some files changed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in seed.iterdir():
        if path.name not in changes:
            os.link(path, folder / path.name)
    for name, change in changes.items():
        target = folder / name
        if "kind" in change:
            put_other(target, change["kind"])
        elif "json" in change:
            target.write_bytes(change["json"].encode("utf-8", "surrogatepass"))
        else:
            write_spoilt(target, change, header_of(seed / name)[1])
    return folder


class Adapters(OfFiles):
    """A LoRA adapter beside a base that is whole."""

    name = "adapter"
    planted = "the adapter's config need be no object (quantize.lora.read_object)"

    def prepare(self) -> None:
        super().prepare()
        import numpy as np
        from edgemistral_quantize.checkpoint import Checkpoint

        from tests.checkpoints import hf_name, random_weights, save, small_config, write_hf

        config = small_config(dim=32, n_heads=1, n_kv_heads=1, hidden_dim=32, n_layers=1)
        self.base = write_hf(self.folder / "base", config, random_weights(config))
        self.seed = self.folder / "adapter"
        self.seed.mkdir()
        tensors = {}
        for name in ("layers.0.wq", "layers.0.w2"):
            module = "base_model.model." + hf_name(name).removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": np.ones((4, 32), np.float32),
                        f"{module}.lora_B.weight": np.ones((32, 4), np.float32)}
        save(self.seed / "adapter_model.safetensors", tensors, "F32")
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "a/b",
                  "target_modules": ["q_proj"], "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
                  "rank_pattern": {}, "alpha_pattern": {"q_proj": 16}, "modules_to_save": None, "init_lora_weights": True}
        (self.seed / "adapter_config.json").write_text(json.dumps(fields))
        Checkpoint(self.base, lora=self.seed)

    def make(self, chance: Random) -> Any:
        config, weights = "adapter_config.json", "adapter_model.safetensors"
        changes: dict[str, Any] = {}
        if chance.random() < 0.6:
            changes[config] = {"json": mutate.as_text(chance, mutate.value(chance,
                json.loads((self.seed / config).read_text())))}
        if not changes or chance.random() < 0.2:
            changes[weights] = spoil_header(chance, header_of(self.seed / weights)[0])
        if chance.random() < 0.1:
            changes[chance.choice((config, weights))] = {"kind": chance.choice(OTHERS)}
        return changes

    def run(self, given: Any) -> str:
        from edgemistral_quantize.checkpoint import Checkpoint

        checkpoint = Checkpoint(self.base, lora=laid_out(self.work / "adapter", self.seed, given))
        for _ in checkpoint.strips("layers.0.wqkv", 1 << 12):
            pass
        return "merged"

    def plant(self) -> None:
        from edgemistral_quantize import lora

        lora.read_object = lambda path, error: json.loads(path.read_bytes())
