"""What `forward` works on: the blueprint, the weights, and the memory of one step and of each thread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.activations import Activations
from edgemistral.kernels.attention import AttentionScratch, Partial, Queries, Rows
from edgemistral.kernels.kv_layout import KVLayout
from edgemistral.kernels.matmul import MatrixScratch
from edgemistral.kernels.sync import Member


class Shape(NamedTuple):
    """The blueprint, as the kernels use it. Widths padded to whole blocks of 128 columns are called `*_cols`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    group: int           # query heads of one KV head
    window: int          # positions a query may see, itself included
    vocab_size: int
    norm_eps: float
    dim_cols: int        # of wqkv, w13, output
    q_cols: int          # of wo
    hidden_cols: int     # of w2
    qkv_dim: int         # rows of wqkv


class Weights(NamedTuple):
    """Byte offsets into `blob`, the mapping of the file; nothing is copied."""

    blob: NDArray[np.uint8]         # (bytes of the file,), read-only
    tok_embeddings: int             # bf16 (vocab_size, dim)
    matrices: NDArray[np.int64]     # (4 * n_layers + 1, 7): wqkv, wo, w13, w2 of every layer, then the output head; `MatrixAt`s
    norms: NDArray[np.int64]        # (2 * n_layers + 1,): attention_norm, ffn_norm of every layer, then the last norm; float32


class State(NamedTuple):
    """The memory that the threads share during one step."""

    x: NDArray[np.float32]         # (tokens, dim_cols) the residual stream; zeros behind dim
    qkv: NDArray[np.float32]       # (tokens, qkv_dim) queries, keys, values
    attn_out: NDArray[np.float32]  # (tokens, q_cols) outputs of attention; zeros behind q_dim
    xq: Activations                # quantized inputs of wqkv, wo, w13 and the output head
    hq: Activations                # quantized inputs of w2
    queries: Queries
    partials: Partial              # (SPLIT_ROWS * n_kv_heads rows) what `merge_splits` merges
    logits: NDArray[np.float32]    # (n_logits, vocab rows)
    cos: NDArray[np.float32]       # (tokens, head_dim / 2)
    sin: NDArray[np.float32]       # (tokens, head_dim / 2)


class Own(NamedTuple):
    """The memory of one thread."""

    matrix: MatrixScratch
    attention: AttentionScratch
    hidden: NDArray[np.float32]    # (tokens * 128,) one block of SwiGLU's output for every token; of every stream for few
    row: NDArray[np.float32]       # (128,) one block of one token


class Pass(NamedTuple):
    """One thread's view of one step."""

    member: Member
    shape: Shape
    weights: Weights
    kv: KVLayout
    rows: Rows
    state: State
    own: Own
