"""Make a trained model easier to quantize, without changing what it computes: even out the inputs of its matrices.

A column of a matrix may be multiplied by any number if its input is divided by it, and each input comes from something linear:
an RMSNorm's weights (of wqkv and w13), the values (of wo), the rows of `up` (of w2). Activations are rounded with one scale for
128 columns, weights with one for 32, so columns of like size lose least. The number for a column is the root of its input's
size over its weights' size (as SmoothQuant, https://arxiv.org/abs/2211.10438, but by root mean squares).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.network import Layer, Mistral

MATRICES = "wqkv", "wo", "w13", "w2"
MOST = 20.0   # that a column is multiplied or divided by


@torch.no_grad()
def balance(model: Mistral, batches: Iterable[Tensor]) -> None:
    """Balance the model in place; `batches` are ids (rows, length) whose activations are typical."""
    sizes = _input_sizes(model, batches)
    c = model.config
    for n, layer in enumerate(model.layers):
        for norm, name in ((layer.attention_norm, "wqkv"), (layer.ffn_norm, "w13")):
            matrix = getattr(layer, name)
            factors = _factors(sizes[n, name], _columns(matrix))
            norm.weight /= factors
            matrix.weight *= factors
        factors = _factors(sizes[n, "w2"], _columns(layer.w2))
        layer.w13.weight[c.hidden_dim :] /= factors[:, None]
        layer.w2.weight *= factors
        by_kv_head = (c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)     # the heads of a group share their values
        inputs, columns = (x.view(by_kv_head).mean(1).flatten() for x in (sizes[n, "wo"], _columns(layer.wo)))
        factors = _factors(inputs, columns)
        layer.wqkv.weight[c.q_dim + c.kv_dim :] /= factors[:, None]
        layer.wo.weight *= factors.view(c.n_kv_heads, 1, c.head_dim).expand(by_kv_head).flatten()


def _input_sizes(model: Mistral, batches: Iterable[Tensor]) -> dict[tuple[int, str], Tensor]:
    """Mean squares of every column that enters a matrix of a layer."""
    sums: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for n, layer in enumerate(model.layers):
        for name in MATRICES:
            def add(_: nn.Module, inputs: tuple[Tensor], key: tuple[int, str] = (n, name)) -> None:
                sums[key] = sums.get(key, 0) + inputs[0].flatten(0, -2).float().square().mean(0)
            hooks.append(getattr(layer, name).register_forward_pre_hook(add))
    compiled, model.run_layer = model.run_layer, Layer.forward     # hooks and compiling do not go together
    for ids in batches:
        model.hidden(ids)
    model.run_layer = compiled
    for hook in hooks:
        hook.remove()
    return sums


def _columns(matrix: nn.Linear) -> Tensor:
    """Mean squares of a matrix's columns."""
    return matrix.weight.square().mean(0)


def _factors(inputs: Tensor, columns: Tensor) -> Tensor:
    """What to multiply columns by, from the mean squares of inputs and weights; their geometric mean is 1."""
    factors = ((inputs + 1e-12) / columns) ** 0.25
    return (factors / factors.log().mean().exp()).clamp(1 / MOST, MOST)
