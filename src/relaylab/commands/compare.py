"""`relaylab compare`: one recipe under several schemes and seeds."""

from relaylab.train.options import CompareConfig


def main(options: CompareConfig) -> int:
    """Train the missing runs, then write and print the table."""
    from relaylab.train.compare import compare

    return compare(options)
