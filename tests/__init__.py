"""The tests mirror the package's folders."""
