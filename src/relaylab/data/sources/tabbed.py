"""Tab-separated lists of image and class name, such as Tiny ImageNet's `val_annotations.txt`.

Other columns are ignored. For lists with class indices or other separators see `relaylab.data.sources.lists`.
"""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, is_image, printable
from relaylab.data.sources.lists import check_files, tidy_name
from relaylab.data.sources.valued import Values
from relaylab.errors import InputError
from relaylab.outside.reading import open_regular, read_bytes

LONGEST = 1 << 16  # bytes of a line
LARGEST = 1 << 30  # bytes of a list


def is_tabbed(file: Path) -> bool:
    """Return whether the first line is an image and a word separated by a tab, or has more than two columns."""
    try:
        with os.fdopen(open_regular(file), "rb") as lines:
            first = next(islice((line for line in iter(lambda: lines.readline(LONGEST), b"") if line.strip()), 1), b"")
    except OSError:  # listing the file raises it
        return False
    name, *rest = first.decode(errors="replace").strip().split("\t")
    return bool(rest) and is_image(name) and (len(rest) > 1 or not rest[0].strip().isdecimal())


def list_tabbed(file: Path, root: Path, named: Sequence[Path], watch: Watch) -> Listing:
    """List the images of a tab-separated list. Names are relative to the resolved folder `root`.

    Raises:
        InputError: a line cannot be parsed, a name leads out of the root or occurs twice, or files are missing.
    """
    rows, values = Rows(), Values()
    rows.file_states.append(file_state(file))
    inside = os.fsencode(root).lstrip(b"/") + b"/"
    for number, line in enumerate(read_bytes(file, LARGEST).decode("utf-8-sig", "surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not label or not is_image(name):
            raise InputError(f"{file.name}, line {number}: {printable(line[:100])!r}; expected NAME, a tab and a class")
        rows.add(tidy_name(os.fsencode(name), root, inside, f"{file.name}, line {number}"), 0)
        values.add(int(label) if label.isdecimal() and len(label) < 10 else label)
    rows.refuse_repeats(file.name)
    check_files(file, root, rows, watch)
    return values.listing(rows, file.name, [Place(str(root), str(root))], named=named)
