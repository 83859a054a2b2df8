"""Benchmarks. Each reports ratios within one run, against a lower bound or a peer.

    python -m benchmarks.<name> [--quick] [--json FILE]

They are not tests: the results depend on the machine, and a missed target does not make them fail.
"""
