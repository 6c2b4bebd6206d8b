"""docs/help.md is what the commands print."""

from __future__ import annotations

from docs.make_help import PATH, reference


def test_the_help_reference_is_current():
    assert PATH.read_text(encoding="utf-8") == reference(), "run: python -m docs.make_help"
