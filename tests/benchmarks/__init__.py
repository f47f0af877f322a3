"""Benchmarks: ratios against plain SQLAlchemy in the same run, and what is counted exactly.

``python -m tests.benchmarks [NAME ...] [--json]`` starts its own servers. A ratio is of the medians
of pairs measured in turn (A B A B ...), since the machine's speed drifts. What works without a
server is given in microseconds of its thread's processor time, round trips are counted on the wire.
"""
