"""Whether the tree is ready to be released as the version that a tag names: python .ci/check_release.py v0.1.0

The tag, `edgemistral.__version__` and a dated heading of CHANGELOG.md, such as "## 0.1.0 (2026-12-01)", must agree.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(tag: str, changelog: str, source: str) -> list[str]:
    """One line for each."""
    found = re.search(r'^__version__ = "([^"]+)"', source, re.M)
    version = found[1] if found else "none"
    result = []
    if tag != f"v{version}":
        result.append(f"the tag is {tag}, but edgemistral/__init__.py says {version}: the tag must be v{version}")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.M):
        result.append(f'CHANGELOG.md has no heading "## {version} (YYYY-MM-DD)": rename "## Unreleased"')
    return result


def main() -> None:
    read = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "edgemistral/__init__.py")}
    sys.exit("\n".join(problems(sys.argv[1], *read.values())) or 0)


if __name__ == "__main__":
    main()
