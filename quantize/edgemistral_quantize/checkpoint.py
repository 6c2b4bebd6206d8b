"""Read a Mistral checkpoint, in either layout, as the source tensors of a blob: checked first, then strip by strip.

A directory is in Hugging Face layout when it has a config.json and weights in `*.safetensors` (those that
`model.safetensors.index.json` lists, when it is there), else in Mistral layout (params.json and
`consolidated*.safetensors`).
The layouts differ in names and in the order of the rows of wq and wk: Mistral's rotate neighbouring rows (2i, 2i + 1)
of a head, Hugging Face's and ours rows (i, i + head_dim / 2). Both differences end in this file.

Tensors are read with plain file reads and not through a map: an unreadable disk is then an error with a name and not
the end of the process, and no page stays behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files import layout, strict_json
from edgemistral.files.safetensors import Entry, read_header
from edgemistral.text.spec import TextSpec
from edgemistral_quantize.text_files import read_text_files

Strip = NDArray[Any]   # rows of a tensor in the checkpoint's dtype; numpy has no bfloat16: its bits as uint16

DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}   # all of these bits set: infinity or NaN

HF_INDEX = "model.safetensors.index.json"
MIN_ROWS = 2 * layout.PANEL   # of a strip
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")   # old transformers stored this constant with the weights


@dataclass(frozen=True)
class Naming:
    """What one layout calls things."""

    config: str                    # file
    tied: str                      # its field that says that the output head is the embeddings
    names: Mapping[str, str]       # theirs by ours, without ".weight"; layers.N.X as layers.{}.X
    neighbours_rotate: bool        # rotary pairs are (2i, 2i + 1) instead of (i, i + head_dim / 2)


HUGGING_FACE = Naming(
    "config.json",
    "tie_word_embeddings",
    {
        "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.wq": "model.layers.{}.self_attn.q_proj", "layers.{}.wk": "model.layers.{}.self_attn.k_proj",
        "layers.{}.wv": "model.layers.{}.self_attn.v_proj", "layers.{}.wo": "model.layers.{}.self_attn.o_proj",
        "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.w1": "model.layers.{}.mlp.gate_proj", "layers.{}.w2": "model.layers.{}.mlp.down_proj",
        "layers.{}.w3": "model.layers.{}.mlp.up_proj",
    },
    neighbours_rotate=False,
)
MISTRAL = Naming(
    "params.json",
    "tied_embeddings",
    {
        "tok_embeddings": "tok_embeddings", "norm": "norm", "output": "output",
        "layers.{}.attention_norm": "layers.{}.attention_norm",
        "layers.{}.wq": "layers.{}.attention.wq", "layers.{}.wk": "layers.{}.attention.wk",
        "layers.{}.wv": "layers.{}.attention.wv", "layers.{}.wo": "layers.{}.attention.wo",
        "layers.{}.ffn_norm": "layers.{}.ffn_norm",
        "layers.{}.w1": "layers.{}.feed_forward.w1", "layers.{}.w2": "layers.{}.feed_forward.w2",
        "layers.{}.w3": "layers.{}.feed_forward.w3",
    },
    neighbours_rotate=True,
)


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name there, and where its bytes lie."""

    name: str
    path: Path
    entry: Entry

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"


class Checkpoint:
    """A checkpoint whose config, tokenizer, tensor names, shapes and dtypes are checked; no weight is read yet.

    Raises BadConfig for the config, BadCheckpoint for everything else, naming file and tensor.
    """

    config: ModelConfig
    tokenizer: bytes            # the SentencePiece model, or the tokenizer.json
    text: TextSpec              # everything else about text
    files: list[Path]           # everything that was or will be read
    n_bytes: int                # of all weights

    def __init__(self, directory: Path, chat_template: Path | None = None) -> None:
        """chat_template: a file with the template to use instead of the checkpoint's."""
        if not directory.is_dir():
            raise BadCheckpoint(f"{directory}: no such directory")
        naming, shards = _find_weights(directory)
        config_file = directory / naming.config
        fields = _read_object(config_file, BadConfig)
        texts = read_text_files(directory, fields, chat_template)
        self.files = [config_file, texts.path, *shards, *([] if chat_template is None else [chat_template])]
        self.tokenizer, self.text = texts.data, texts.spec
        bos_id = texts.eos_id if texts.bos_id is None else texts.bos_id      # never used where there is none
        try:
            if naming is HUGGING_FACE:
                self.config = ModelConfig.from_hf({**fields, "bos_token_id": bos_id, "eos_token_id": texts.eos_id})
            else:
                self.config = ModelConfig.from_mistral(fields, bos_id, texts.eos_id)
            self.tokenizer_of_text = self.text.tokenizer(
                self.tokenizer, self.config.vocab_size, texts.path.name, texts.eos_id
            )
        except BadConfig as problem:
            raise BadConfig(f"{config_file}: {problem}") from None
        except BadInput as problem:
            raise BadCheckpoint(f"{directory}: {problem}") from None
        self._neighbours_rotate = naming.neighbours_rotate
        expected = expected_tensors(self.config, naming, tied=fields.get(naming.tied) is True)
        spare = naming.names["output"] + ".weight"   # stored all the same by some who tie it to the embeddings
        self._sources = _match(expected, _list_tensors(shards), spare, directory)
        self.n_bytes = sum(source.entry.n_bytes for source in self._sources.values())

    @property
    def min_strip_bytes(self) -> int:
        """Of the largest strip that cannot be smaller, as float32: a head of wqkv, 32 rows of another matrix."""
        c = self.config
        return 4 * max(c.head_dim * c.dim, MIN_ROWS * max(2 * c.dim, c.q_dim, c.hidden_dim))

    def strips(self, name: str, strip_bytes: int) -> Iterator[Strip]:
        """The rows of blob tensor `name` (a matrix, a norm, the embeddings) in the order in which the blob stores them.

        Strips are (rows, cols) in the checkpoint's dtype, finite, and at most `strip_bytes` large when widened to
        float32 unless `min_strip_bytes` is more. All but the last have a multiple of 32 rows; a norm is one row.
        Raises BadCheckpoint for a NaN or an infinity, and when the file cannot be read or has become shorter.
        """
        layer, _, part = name.rpartition(".")
        at = layer + "." if layer else ""
        head_dim = self.config.head_dim
        if part == "wqkv":
            for source_name in ("wq", "wk", "wv"):
                source = self._sources[at + source_name]
                for strip in _read_strips(source, strip_bytes, head_dim):
                    yield _halve_pairs(strip, head_dim) if self._neighbours_rotate and source_name != "wv" else strip
        elif part == "w13":
            gate, up = (_read_strips(self._sources[at + w], strip_bytes // 2, MIN_ROWS) for w in ("w1", "w3"))
            for gate_strip, up_strip in zip(gate, up, strict=True):
                yield layout.interleave_gate_up(gate_strip, up_strip)
        else:
            yield from _read_strips(self._sources[name], strip_bytes, MIN_ROWS)


def _read_strips(source: Source, strip_bytes: int, step: int) -> Iterator[Strip]:
    """Rows of one tensor in file order, a multiple of `step` at a time, each value checked to be finite."""
    *_, cols = source.entry.shape
    rows = source.entry.shape[0] if len(source.entry.shape) == 2 else 1
    dtype, exponent = DTYPES[source.entry.dtype], EXPONENT[source.entry.dtype]
    at_once = max(step, strip_bytes // (4 * cols) // step * step)
    for begin in range(0, rows, at_once):
        strip = np.empty((min(at_once, rows - begin), cols), dtype)
        try:
            with source.path.open("rb") as file:
                file.seek(source.entry.offset + begin * cols * dtype.itemsize)
                n_read = file.readinto(strip.data.cast("B"))
        except OSError as problem:
            raise BadCheckpoint(f"{source} cannot be read: {problem.strerror or problem}") from None
        if n_read != strip.nbytes:
            raise BadCheckpoint(f"{source} ends early: the file was changed while it was read")
        bits = strip.view(f"<u{dtype.itemsize}")
        exponents = bits & bits.dtype.type(exponent)
        if exponents.max() == exponent:
            row = begin + int((exponents == exponent).any(axis=1).argmax())
            raise BadCheckpoint(f"{source} has a NaN or infinity in row {row}")
        yield strip


def _halve_pairs(rows: Strip, head_dim: int) -> Strip:
    """Rows (n * head_dim, cols) of whole heads: neighbours (2i, 2i + 1) become (i, i + head_dim / 2)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def expected_tensors(config: ModelConfig, naming: Naming, tied: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every source tensor: its name here, its name in the checkpoint, its shape."""
    c = config
    shapes = {
        "attention_norm": (c.dim,), "wq": (c.q_dim, c.dim), "wk": (c.kv_dim, c.dim), "wv": (c.kv_dim, c.dim),
        "wo": (c.dim, c.q_dim), "ffn_norm": (c.dim,), "w1": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim),
        "w3": (c.hidden_dim, c.dim),
    }
    names = {ours: theirs + ".weight" for ours, theirs in naming.names.items()}
    yield "tok_embeddings", names["tok_embeddings"], (c.vocab_size, c.dim)
    for layer in range(c.n_layers):
        for part, shape in shapes.items():
            ours = "layers.{}." + part
            yield ours.format(layer), names[ours].format(layer), shape
    yield "norm", names["norm"], (c.dim,)
    yield "output", names["tok_embeddings" if tied else "output"], (c.vocab_size, c.dim)


def _match(
    expected: Iterable[tuple[str, str, tuple[int, ...]]], found: Mapping[str, Source], spare: str, directory: Path
) -> dict[str, Source]:
    """The sources by our names; nothing may be missing, misshapen or left over (but `spare`)."""
    sources: dict[str, Source] = {}
    for ours, theirs, shape in expected:
        source = found.get(theirs)
        if source is None:
            raise BadCheckpoint(f"{directory}: tensor {theirs} is missing")
        if source.entry.shape != shape:
            raise BadCheckpoint(f"{source} has shape {list(source.entry.shape)}, the config asks for {list(shape)}")
        if source.entry.dtype not in DTYPES:
            raise BadCheckpoint(f"{source} has dtype {source.entry.dtype}; supported are {', '.join(DTYPES)}")
        sources[ours] = source
    for ours, up in sources.items():
        if ours.endswith(".w3") and up.entry.dtype != (gate := sources[ours[:-1] + "1"]).entry.dtype:
            raise BadCheckpoint(f"{up} has dtype {up.entry.dtype}, but {gate.name} has {gate.entry.dtype}")
    used = {spare, *(source.name for source in sources.values())}
    for name, source in found.items():
        if name not in used and not IGNORED.fullmatch(name):
            raise BadCheckpoint(f"{source} does not belong to a Mistral model with this config")
    return sources


def _list_tensors(shards: list[Path]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for path in shards:
        try:
            with path.open("rb") as file:
                header = read_header(file, path, BadCheckpoint)
        except OSError as problem:
            raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}") from None
        for name, entry in header.tensors.items():
            if name in found:
                raise BadCheckpoint(f"{path}: tensor {name} is in {found[name].path.name} too")
            found[name] = Source(name, path, entry)
    return found


def _find_weights(directory: Path) -> tuple[Naming, list[Path]]:
    """The layout and the files that hold the weights; a directory with both layouts is read in Hugging Face's."""
    present = [naming for naming in (HUGGING_FACE, MISTRAL) if (directory / naming.config).is_file()]
    if not present:
        raise BadCheckpoint(f"{directory}: neither config.json (Hugging Face) nor params.json (Mistral) is there")
    for naming in present:
        own = [path for path in directory.glob("*.safetensors") if path.name.startswith("consolidated")]
        if naming is HUGGING_FACE:
            index = directory / HF_INDEX
            own = _indexed(index) if index.is_file() else sorted(set(directory.glob("*.safetensors")) - set(own))
        if own:
            return naming, sorted(own)
    others = [path.name for pattern in ("*.pth", "*.bin", "*.gguf") for path in directory.glob(pattern)]
    hint = f"; {others[0]} has a format that is not read" if others else ""
    raise BadCheckpoint(f"{directory}: no safetensors files with weights{hint}")


def _indexed(index: Path) -> list[Path]:
    weight_map = _read_object(index, BadCheckpoint).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index}: no weight_map of file names")
    names = set(weight_map.values())
    for name in sorted(names):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise BadCheckpoint(f"{index}: lists {name[:80]!r}, which is not there; is the download complete?")
    return [index.parent / name for name in names]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}") from None


def _read_object(path: Path, error: type[BadInput]) -> dict[str, Any]:
    fields = strict_json.parse(_read_bytes(path), str(path), error)
    if not isinstance(fields, dict):
        raise error(f"{path}: not a JSON object")
    return fields
