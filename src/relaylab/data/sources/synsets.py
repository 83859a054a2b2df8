"""Reader of a meta.mat, a process of its own: `python -m relaylab.data.sources.synsets FILE` prints JSON rows."""

import json
import resource
import sys

MEMORY = 4 << 30  # bytes of addresses


def main(path: str) -> int:
    """Print number, synset and name of each leaf of ImageNet's tree; return the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = [one for one in synsets.flat if int(one["num_children"]) == 0]
        rows = [(int(one["ILSVRC2012_ID"]), str(one["WNID"]), str(one["words"])) for one in leaves]
    except Exception as error:  # loadmat raises whatever the damage leads to
        print(ascii(f"{type(error).__name__}: {error}"[:200])[1:-1], file=sys.stderr)
        return 1
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
