"""Benchmarks: `python -m bench.report` runs them and makes the table."""
