"""Measurements as ratios within one run, each against a lower bound or a peer.

    python -m benchmarks.<name> [--quick] [--json FILE]

They are no tests: what they print depends on the machine, and a missed target does not fail them.
"""
