"""Quantized Mistral-7B-family models on the CPU.

    import edgemistral

    with edgemistral.load("mistral-q4.safetensors") as model:
        for piece in model.chat([{"role": "user", "content": "What should I see in Paris?"}]):
            print(piece, end="", flush=True)

Importing this package is fast: numba and the rest are imported when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgemistral.errors import (
    BadBlob,
    BadCheckpoint,
    BadConfig,
    BadInput,
    BadRequest,
    BadSession,
    Cancelled,
    ContextOverflow,
    DamagedBlob,
    EdgeMistralError,
    OutOfMemoryBudget,
)

if TYPE_CHECKING:
    from edgemistral.async_reply import AsyncReply
    from edgemistral.config import ModelConfig
    from edgemistral.demo import demo_model
    from edgemistral.generate.sampler import SamplingParams
    from edgemistral.generate.tasks import Generation, Usage
    from edgemistral.model import Model, Reply, load
    from edgemistral.session import Session
    from edgemistral.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "AsyncReply",
    "BadBlob",
    "BadCheckpoint",
    "BadConfig",
    "BadInput",
    "BadRequest",
    "BadSession",
    "Cancelled",
    "ContextOverflow",
    "DamagedBlob",
    "EdgeMistralError",
    "Generation",
    "Model",
    "ModelConfig",
    "OutOfMemoryBudget",
    "Reply",
    "SamplingParams",
    "Session",
    "Stats",
    "Usage",
    "__version__",
    "demo_model",
    "load",
]

# What is imported on first use (PEP 562): name -> module.
_LAZY = {
    "AsyncReply": "async_reply",
    "Generation": "generate.tasks",
    "Model": "model",
    "ModelConfig": "config",
    "Reply": "model",
    "SamplingParams": "generate.sampler",
    "Session": "session",
    "Stats": "stats",
    "Usage": "generate.tasks",
    "demo_model": "demo",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
