"""Optional dependencies: `pip install edgemistral` installs the library; the server, the line editor and others are extras."""

from __future__ import annotations

EXTRAS = {
    "fastapi": "server",
    "h11": "server",
    "llguidance": "server",
    "prometheus_client": "server",
    "pydantic": "server",
    "starlette": "server",
    "uvicorn": "server",
    "prompt_toolkit": "chat",
    "tokenizers": "hf",
    "gguf": "gguf",
}
"""Module -> the extra of pyproject.toml that installs it."""


def missing(error: ModuleNotFoundError) -> str | None:
    """One line that says what to install, or None if no extra has the module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"this needs {module}, which is not installed: pip install 'edgemistral[{EXTRAS[module]}]'"
