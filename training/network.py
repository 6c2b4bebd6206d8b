"""The Mistral architecture in PyTorch, for training: what transformers' `MistralForCausalLM` computes, with less around it.

Matrices that read the same input are one (`wqkv`, `w13`); `to_hf` takes them apart and names them as transformers does.
Rotary pairs are (i, i + head_dim / 2), as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgemistral.config import ModelConfig

INITIAL_STD = 0.02


class Mistral(nn.Module):
    """Logits (batch, length, vocab_size) for ids (batch, length).

    Compiled, a layer's small operations are fused, for any batch and length: training is 1.6 times as fast. It takes half a
    minute and a C++ compiler.
    """

    def __init__(self, config: ModelConfig, compiled: bool = False) -> None:
        super().__init__()
        c = self.config = config
        self.run_layer = torch.compile(Layer.forward, dynamic=True) if compiled else Layer.forward
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(c.context), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)   # (context, head_dim / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("mask", torch.full((c.context, c.context), -1e9).triu(1), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("wo.weight", "w2.weight"))   # these add to the residual stream once a layer
                nn.init.normal_(parameter, std=INITIAL_STD / (2 * c.n_layers) ** 0.5 if deep else INITIAL_STD)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output head reads, (batch, length, dim)."""
        x, length = self.embed(ids), ids.shape[1]
        cos, sin, mask = self.cos[:length], self.sin[:length], self.mask[:length, :length]
        for layer in self.layers:
            x = self.run_layer(layer, x, cos, sin, mask)
        return self.norm(x)

    def to_hf(self) -> dict[str, Tensor]:
        """The weights in bfloat16 under transformers' names."""
        c = self.config
        tensors = {"model.embed_tokens": self.embed, "model.norm": self.norm, "lm_head": self.output}
        weights = {f"{name}.weight": module.weight for name, module in tensors.items()}
        for n, layer in enumerate(self.layers):
            at = f"model.layers.{n}."
            q, k, v = layer.wqkv.weight.split([c.q_dim, c.kv_dim, c.kv_dim])
            w1, w3 = layer.w13.weight.chunk(2)
            weights |= {
                f"{at}input_layernorm.weight": layer.attention_norm.weight,
                f"{at}self_attn.q_proj.weight": q, f"{at}self_attn.k_proj.weight": k, f"{at}self_attn.v_proj.weight": v,
                f"{at}self_attn.o_proj.weight": layer.wo.weight,
                f"{at}post_attention_layernorm.weight": layer.ffn_norm.weight,
                f"{at}mlp.gate_proj.weight": w1, f"{at}mlp.up_proj.weight": w3, f"{at}mlp.down_proj.weight": layer.w2.weight,
            }
        return {name: tensor.detach().bfloat16().contiguous() for name, tensor in weights.items()}


class Layer(nn.Module):
    """Grouped-query attention, then SwiGLU, each behind an RMSNorm and added to its input."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.attention_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.wqkv = nn.Linear(c.dim, c.q_dim + 2 * c.kv_dim, bias=False)
        self.wo = nn.Linear(c.q_dim, c.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.w13 = nn.Linear(c.dim, 2 * c.hidden_dim, bias=False)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.wqkv(self.attention_norm(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        repeat = self.n_heads // self.n_kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        attended = attention(rotate(q, cos, sin), k, v, mask)
        x = x + self.wo(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """All (batch, heads, length, head_dim), written out: PyTorch's own takes four times as long on a CPU for 128 positions."""
    with torch.autocast(q.device.type, enabled=False):   # it would widen the probabilities
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores + mask.to(q.dtype), -1) @ v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (batch, heads, length, head_dim) by angles (length, head_dim / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
