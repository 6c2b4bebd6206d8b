"""Settings that must stand before NumPy loads. Compiled kernels stay in the user's cache: only a first run compiles."""

from __future__ import annotations

import functools
import os
import ssl

ssl.create_default_context = functools.cache(ssl.create_default_context)   # 80 ms for each call of httpx, and all is http
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # idle BLAS workers spin and take a core from what is tested
