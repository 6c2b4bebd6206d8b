"""Regular expressions become grammars that end where the expression does."""

import pytest

from edgemistral.server.constraints import constraint_of


@pytest.mark.parametrize(("pattern", "grammar"), [
    ("a/b", r"start: /a\/b/"), (r"a\/b", r"start: /a\/b/"), (r"a\\/b", r"start: /a\\\/b/"), (r"\d+", r"start: /\d+/"),
])
def test_slashes_of_a_regular_expression_are_escaped_once(pattern, grammar):
    assert constraint_of({"guided_regex": pattern}).value == grammar
