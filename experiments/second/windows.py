"""Recipe files of the question "windows": a ResNet in K windows, each sharing its lowest blocks with the one below.

python -m experiments.second.windows FOLDER    # writes windows-K-S.toml for ResNet-32
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from relaylab.models.named import allow
from relaylab.recipes.changes import with_changes
from relaylab.recipes.files import read_recipe
from relaylab.recipes.schema import Recipe

ARMS = {  # by depth: K windows, S shared blocks
    32: ((2, 2), (4, 1), (4, 4), (8, 1), (8, 2), (15, 1), (15, 2), (15, 3)),
    110: ((2, 7), (4, 1), (4, 14), (8, 1), (8, 7), (27, 1), (27, 2), (54, 1), (54, 3)),
}
# For each K, the first of its recipes, which is trained isolated, too.
ISOLATED = {depth: tuple(dict(reversed(arms)).items()) for depth, arms in ARMS.items()}
PUBLISHED = ("network.options.width=16", "network.image_size=32", "images.short_side=32", "augmentation.padding=4",
             "evaluation.scales=32")  # changes to the size of the papers on local learning  # fmt: skip

RECIPE = """\
# The second check, docs/evidence/second-check.md: ResNet-{depth} in {windows} windows.
name = "windows-{windows}-{shared}"
row = "ResNet-{depth}, {windows} windows, {shared} shared blocks"
scheme = "relay"

[network]
architecture = {architecture}
num_classes = 10
image_size = 16
options = {{depth = {depth}, width = 8}}

[plan.primary]
bottom = "{primary}"
{auxiliary}
[images]
data_set = "any"
short_side = 16
sampling = "shuffled"

[augmentation]
colour_shift = 0.0
mean = "channel"
divide = true
padding = 2

[optimizer]
algorithm = "sgd"
lr = 0.1
momentum = 0.9
weight_decay = 0.0005
decay_norms_and_biases = false
batch_size = 128
iterations = 1872  # 12 epochs of 20,000 images
evaluate_every = 312
warmup = 156
clip_norm = "none"

[optimizer.schedule]
kind = "cosine"

[loss]
function = "cross-entropy"

[evaluation]
protocol = "single crop"
scales = [16]
"""
AUXILIARY = """
[plan.auxiliary.w{number}]
top = "{top}"{bottom}
weight = 1.0
head = "conv"
"""


def blocks(depth: int) -> list[str]:
    """Return the names of the blocks of a ResNet for small images."""
    return [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range((depth - 2) // 6)]


def recipe(windows: int, shared: int, depth: int = 32) -> str:
    """Return the text of a recipe file.

    Args:
        windows: number of windows, as equal in blocks as can be, the larger ones lowest.
        shared: blocks that each window shares with the window below.
        depth: weight layers of the network.
    """
    names = blocks(depth)
    size, larger = divmod(len(names), windows)
    ends = [size * k + min(k, larger) for k in range(windows + 1)]
    auxiliary = ""
    for number, (start, end) in enumerate(itertools.pairwise(ends[:-1])):
        bottom = f'\nbottom = "{names[max(0, start - shared)]}"' if number else ""
        auxiliary += AUXILIARY.format(number=number, top=names[end - 1], bottom=bottom)
    return RECIPE.format(
        windows=windows,
        shared=shared,
        depth=depth,
        architecture=f'"{Path(__file__).with_name("networks.py")}:resnet"',
        primary=names[max(0, ends[-2] - shared)],
        auxiliary=auxiliary,
    )


def load(windows: int, shared: int, depth: int = 32, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe of `recipe` with changes such as `PUBLISHED`; its network can be built."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe(windows, shared, depth), encoding="utf-8")
        loaded, _ = with_changes(read_recipe(path), changes)
    allow(loaded.network)
    return loaded


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for windows, shared in ARMS[32]:
        (folder / f"windows-{windows}-{shared}.toml").write_text(recipe(windows, shared), encoding="utf-8")
