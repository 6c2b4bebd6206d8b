"""python bench/fuzz.py: as `make fuzz MINUTES=10`; adds to bench/results/fuzz.json."""

from __future__ import annotations

import sys

from tests.fuzz.__main__ import main

if __name__ == "__main__":
    sys.argv[1:] = ["--minutes", "10", "--record"]
    sys.exit(main())
