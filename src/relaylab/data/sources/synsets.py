"""Reader of meta.mat, run in its own process: `python -m relaylab.data.sources.synsets FILE` prints JSON rows."""

import json
import resource
import sys

MEMORY = 4 << 30  # bytes of address space


def main(path: str) -> int:
    """Print number, synset and name of each leaf of ImageNet's hierarchy; return the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = [entry for entry in synsets.flat if int(entry["num_children"]) == 0]
        rows = [(int(leaf["ILSVRC2012_ID"]), str(leaf["WNID"]), str(leaf["words"])) for leaf in leaves]
    except Exception as error:  # loadmat raises exceptions of any type for damaged files
        print(ascii(f"{type(error).__name__}: {error}"[:200])[1:-1], file=sys.stderr)
        return 1
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
