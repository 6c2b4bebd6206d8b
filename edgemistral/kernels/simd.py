"""The vector vocabulary of the kernels: 64 bytes, 16 x int32 and 16 x float32, on machines of any vector width.

Kernels import it from here. It is `simd_llvm`, which compiles to vector instructions, or under EDGEMISTRAL_SIMD=interpret
its twin `simd_numpy`, which runs as ordinary Python and checks the bounds of every load and store. Both have the same names
and give the same bits.
"""

from typing import TYPE_CHECKING

from edgemistral.kernels.lowering import INTERPRET

if TYPE_CHECKING or not INTERPRET:
    from edgemistral.kernels.simd_llvm import *  # noqa: F403
else:
    from edgemistral.kernels.simd_numpy import *  # noqa: F403
