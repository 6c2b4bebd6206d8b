"""llama.cpp's side of a comparison: GGUF files of our checkpoints and shapes, in any of its types, and its logits.

Needs the `bench` extra: gguf writes the files, llama-cpp-python quantizes and runs them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.bf16 import widen
from edgemistral.files.layout import PANEL

NAMES = {   # theirs by ours
    "attention_norm": "attn_norm", "wo": "attn_output", "ffn_norm": "ffn_norm", "w2": "ffn_down",
}


def new_writer(path: Path, c: ModelConfig) -> gguf.GGUFWriter:
    """A GGUF of a Mistral without tensors; its tokenizer is a list of made-up words, because only ids are used."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{n}".encode() for n in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_float32(path: Path, checkpoint: Checkpoint) -> None:
    """Write the weights of a checkpoint unchanged."""
    writer = new_writer(path, checkpoint.config)
    for name, values in _tensors(checkpoint):
        writer.add_tensor(name, np.ascontiguousarray(values))
    finish(writer)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(llama.cpp's name, values); rotary pairs are (2i, 2i + 1) there."""
    c = checkpoint.config

    def read(name: str) -> NDArray[np.float32]:
        return np.concatenate([widen(strip) for strip in checkpoint.strips(name, 1 << 26)])

    def neighbours(w: NDArray[np.float32]) -> NDArray[np.float32]:
        return w.reshape(-1, 2, c.head_dim // 2, c.dim).swapaxes(1, 2).reshape(-1, c.dim)

    yield "token_embd.weight", read("tok_embeddings")
    for layer in range(c.n_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        q, k, v = np.split(read(f"{ours}wqkv"), [c.q_dim, c.q_dim + c.kv_dim])
        gate_up = read(f"{ours}w13").reshape(-1, 2, PANEL, c.dim)[: -(-c.hidden_dim // PANEL)]
        gate, up = (gate_up[:, i].reshape(-1, c.dim)[: c.hidden_dim] for i in (0, 1))
        for name, values in (("attn_q", neighbours(q)), ("attn_k", neighbours(k)), ("attn_v", v), ("ffn_gate", gate),
                             ("ffn_up", up)):
            yield f"{theirs}{name}.weight", values
        for ours_name, name in NAMES.items():
            values = read(f"{ours}{ours_name}")
            yield f"{theirs}{name}.weight", values[0] if ours_name.endswith("norm") else values
    yield "output_norm.weight", read("norm")[0]
    yield "output.weight", read("output")


def quantize(
    source: Path, target: Path, kind: str, embeddings: str | None = None, output: str | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Like `llama-quantize SOURCE TARGET KIND`; `embeddings` and `output` are types for only these tensors.

    importance: its importance matrix: llama.cpp's name of the tensor -> mean squares (cols,) of the columns' inputs.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if embeddings is not None:
        params.token_embedding_type = int(getattr(gguf.GGMLQuantizationType, embeddings))
    if output is not None:
        params.output_tensor_type = int(getattr(gguf.GGMLQuantizationType, output))
    if importance is not None:
        entry = llama_cpp.llama_model_imatrix_data
        table = (entry * (len(importance) + 1))()   # a name of NULL ends it
        for row, (name, values) in zip(table, importance.items(), strict=False):
            row.name, row.size = name.encode(), len(values)
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(table, ctypes.POINTER(entry))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}")


def bits_per_weight(path: Path) -> dict[str, float]:
    """Bits per weight of the layers' matrices, and of all tensors."""
    tensors = gguf.GGUFReader(path).tensors
    layers = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return {name: 8 * sum(int(t.n_bytes) for t in some) / sum(int(t.n_elements) for t in some)
            for name, some in (("layers", layers), ("file", tensors))}


class LlamaCpp:
    """What `evaluate` needs of a model, computed by llama.cpp with its defaults.

    kv: the type of keys and values, by gguf's name. Types other than F16 need its flash attention, which is then on.
    """

    def __init__(
        self, path: Path, config: ModelConfig, threads: int = 1, kv: str = "F16", context: int | None = None
    ) -> None:
        self.config, self.context = config, context or config.context
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.context
        params.n_threads = params.n_threads_batch = threads
        if kv != "F16":
            params.type_k = params.type_v = int(getattr(gguf.GGMLQuantizationType, kv))
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)

    def logits(self, ids: Any) -> NDArray[np.float32]:
        """(len(ids), vocab_size)"""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = int(token), n, 1, 0, 1
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(ids), self.config.vocab_size)).copy()
        llama_cpp.llama_batch_free(batch)
        return values

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
