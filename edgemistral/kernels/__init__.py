"""The numba kernels. Nothing here checks a bound: whoever calls a kernel has validated sizes, offsets and dtypes before."""
