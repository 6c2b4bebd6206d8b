"""The names of tensors in each layout, and the match of found tensors to ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from edgemistral.config import ModelConfig
from edgemistral.errors import BadCheckpoint


@dataclass(frozen=True)
class Naming:
    """The names in one layout."""

    config: str                    # file
    tied: str                      # its field for an output head that is the embeddings
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
GGUF = Naming(
    "general.architecture",
    "",
    {
        "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
        "layers.{}.attention_norm": "blk.{}.attn_norm",
        "layers.{}.wq": "blk.{}.attn_q", "layers.{}.wk": "blk.{}.attn_k",
        "layers.{}.wv": "blk.{}.attn_v", "layers.{}.wo": "blk.{}.attn_output",
        "layers.{}.ffn_norm": "blk.{}.ffn_norm",
        "layers.{}.w1": "blk.{}.ffn_gate", "layers.{}.w2": "blk.{}.ffn_down", "layers.{}.w3": "blk.{}.ffn_up",
    },
    neighbours_rotate=True,
)

CONSTANTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")   # stored, but computed here
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\.")

class Shaped(Protocol):
    """A tensor that was found; its str says where."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""


Found = TypeVar("Found", bound=Shaped)


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


def without_prefix(found: Mapping[str, Found], naming: Naming, where: object) -> dict[str, Found]:
    """The same under the layout's own names, without prefixes of wrappers.

    Such prefixes are `base_model.model.` (PEFT), `_orig_mod.` (torch.compile), `language_model.`, one `model.` too
    many or, in a bare backbone, too few. BadCheckpoint: two tensors would have the same name.
    """
    names = {name: WRAPPERS.sub("", name) for name in found}
    prefix = _common_prefix(names.values())
    renamed: dict[str, Found] = {}
    core = naming.names["tok_embeddings"]                       # model.embed_tokens
    outer, _, inner = core.rpartition(".")
    bare = bool(outer) and f"{inner}.weight" in {name[len(prefix):] for name in names.values()}
    for name, short in names.items():
        short = short[len(prefix):]
        if bare and not short.startswith(naming.names["output"] + "."):
            short = f"{outer}.{short}"
        if short in renamed:
            raise BadCheckpoint(f"{where}: two tensors are {short} without their prefixes; {name[:80]} is one of them")
        renamed[short] = found[name]
    return renamed


def _common_prefix(names: Iterable[str]) -> str:
    """The longest common prefix of all names that ends in a dot, or ""."""
    names = list(names)
    low, high = min(names, default=""), max(names, default="")
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: low.rfind(".", 0, length) + 1] if len(names) > 1 else ""


def match(
    expected: Iterable[tuple[str, str, tuple[int, ...]]], found: Mapping[str, Found], spare: str, where: object
) -> dict[str, Found]:
    """The tensors by our names. BadCheckpoint: one is missing, misshapen or left over (except `spare`)."""
    matched: dict[str, Found] = {}
    used = {spare}
    for ours, theirs, shape in expected:
        tensor = found.get(theirs)
        if tensor is None:
            raise BadCheckpoint(f"{where}: tensor {theirs} is missing{_instead(theirs, found)}")
        if tensor.shape != shape:
            raise BadCheckpoint(f"{tensor} has shape {list(tensor.shape)}, the config asks for {list(shape)}")
        matched[ours] = tensor
        used.add(theirs)
    for name, tensor in found.items():
        if name not in used and not CONSTANTS.fullmatch(name):
            what = ""
            if ".lora_" in name:
                what = ": it is a LoRA adapter's; merge it first, or give the adapter with --lora"
            elif name.endswith(".bias"):
                what = "; supported: models without biases"
            raise BadCheckpoint(f"{tensor} does not belong to a model with this config{what}")
    return matched


def _instead(name: str, found: Mapping[str, object]) -> str:
    """The end of a message: a tensor with a similar name."""
    similar = next((other for other in found if other.endswith(name.removeprefix("model."))), None)
    if similar is None and found and not any(part in other for other in found for part in ("layers.", "blk.")):
        similar = next(iter(found))
    return f"; {similar[:80]} is there" if similar is not None else ""
