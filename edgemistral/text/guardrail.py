"""The system text that Mistral recommends as a guardrail (https://docs.mistral.ai/capabilities/guardrailing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GUARDRAIL = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, unethical, "
    "prejudiced, or negative content. Ensure replies promote fairness and positivity."
)


def with_guardrail(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with the guardrail first; its own system text follows after a blank line."""
    return [{"role": "system", "content": GUARDRAIL}, *messages]
