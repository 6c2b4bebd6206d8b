"""The numba kernels. They check no bounds: the caller must validate sizes, offsets and dtypes."""
