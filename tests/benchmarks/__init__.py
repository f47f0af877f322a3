"""Benchmarks: ratios against plain SQLAlchemy in the same run, never absolute times.

``python -m tests.benchmarks [NAME ...] [--json]`` starts its own servers. Each figure is the median
of pairs measured in turn (A B A B ...), since the machine's speed drifts.
"""
