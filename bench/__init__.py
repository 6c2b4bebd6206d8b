"""Benchmarks: each module prints a table, writes JSON, and some a plot."""
