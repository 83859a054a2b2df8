"""The options of a training run. No torch in here; see `relaylab.options`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.options import Folder, Images, Number, Switch, too_small
from relaylab.recipes.files import is_file
from relaylab.recipes.schema import Dial

Name = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Changes = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]", help_behavior_hint="", name="set")
]
Resume = Annotated[str | None, tyro.conf.arg(metavar="auto|PATH", help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What is trained, and on which images."""

    recipe: Name = None
    """A recipe's name, which `relaylab recipes` lists, or a recipe file (.toml)."""

    data: Images = ()
    """Images: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, tar or zip files, WebDataset shards, Parquet files,
    or Places365, iNaturalist and Tiny ImageNet as they come; or, together with --val-data, anything that docs/data.md
    describes. A pattern such as 'shard-{000..146}.tar' stands for several files."""

    val_data: Images = ()
    """Validation images, where --data has training images only, as with lists."""

    scale: Dial = "paper"
    """The paper's size, or the same row on MiniPlaces (small) or on next to nothing (tiny)."""

    changes: Changes = ()
    """Change values of the recipe, by the names that `relaylab recipes show` prints: optimizer.lr=0.02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions(RunOptions):
    """Training and monitoring options that are not part of the recipe."""

    devices: int = 1
    """Processes on this machine, each with a device of its own. For several machines, start with torchrun."""

    restarts: int = 3
    """With several devices: maximum number of restarts from the last checkpoint after a process dies."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes GPUs if there are any."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several devices: replicate the network on each (ddp), or shard its parameters across them (fsdp)."""

    precision: Literal["32", "bf16", "fp16"] = "32"
    """Numerical precision; bf16 and fp16 mean mixed precision, fp16 with loss scaling."""

    accumulate: int = 1
    """Split each device's share of the batch into N micro-batches and accumulate their gradients, to save memory."""

    early_release: Switch = False
    """Run each loss's backward pass as soon as the forward pass reaches its head, and free its window's memory before
    the layers above run. The gradients are the same; it is for relay and isolated windows."""

    batch_norm: Literal["local", "synchronised"] = "local"
    """With several devices: statistics of each device's own images, or of all (GPUs only)."""

    memory_format: Literal["channels-last", "contiguous"] = "channels-last"
    """Memory format of feature maps; channels-last is faster on most devices."""

    compile: Switch = False
    """Compile the layers outside of overlaps with torch.compile."""

    workers: Number = None
    """Processes that decode images, for each device (default: this machine's cores, divided among the devices)."""

    images: Literal["auto", "memory", "disk"] = "auto"
    """Decode all images once and keep them in memory, or read them as they are needed; auto decides by their size."""

    save_every: Number = None
    """Also save a checkpoint every N iterations (default: only after each evaluation)."""

    keep: Number = None
    """Number of recent checkpoints to keep besides the best one (default: 2 during training, 1 once finished)."""

    log_every: int = 20
    """Log training metrics every N iterations."""

    diagnose_every: int = 500
    """Log gradient statistics (magnitudes per layer and segment, cosines between losses) every N iterations; 0 disables
    it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(RuntimeOptions):
    """Train a recipe, or resume a run.

    Training can be stopped at any time (Ctrl-C, SIGTERM, a power cut) and continues with --resume.

    A run is a folder: resolved configuration, environment, metrics as JSON lines and for TensorBoard, checkpoints, log,
    and at the end a model file for `relaylab predict` and `relaylab export`.
    """

    seed: int = 0
    """Seed of weights, batches, crops and dropout."""

    out: Folder = None
    """Folder of the run; it must be new or empty. (default: runs/RECIPE/TIME-sSEED)."""

    resume: Resume = None
    """Resume a run: its folder, one of its checkpoints, or "auto" for the newest run of these very options, or a new
    one if there is none."""

    given: Annotated[frozenset[str], tyro.conf.Suppress] = field(default=frozenset(), compare=False)


def option_problems(options: RuntimeOptions) -> list[str]:
    """Return error messages for numbers that are too small and options that exclude each other."""
    least = {"devices": 1, "restarts": 0, "accumulate": 1, "workers": 0, "save_every": 1, "keep": 1}
    problems = too_small(options, **least, log_every=1, diagnose_every=0, seed=0)
    if options.early_release and options.strategy == "fsdp":
        problems.append("--early-release needs whole parameters on each device: leave out --strategy fsdp")
    return problems


def name_of(options: RunOptions) -> str:
    """Return the name of a recipe, or of its file, with its scale."""
    name = Path(options.recipe).stem if options.recipe and is_file(options.recipe) else f"{options.recipe}"
    return name if options.scale == "paper" else f"{name}-{options.scale}"
