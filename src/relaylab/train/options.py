"""Options of a training run. This module must not import torch; see `relaylab.options`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.options import Folder, Images, Number, Switch, too_small
from relaylab.recipes.files import is_file
from relaylab.recipes.schema import Scale

Name = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Changes = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]", help_behavior_hint="", name="set")
]
Resume = Annotated[str | None, tyro.conf.arg(metavar="auto|PATH", help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Recipe and images of a run."""

    recipe: Name = None
    """Name of a recipe (see `relaylab recipes`), or a recipe file (.toml)."""

    data: Images = ()
    """Training and validation images: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, tar or zip files, WebDataset
    shards, Parquet files, or Places365, iNaturalist or Tiny ImageNet as distributed. With --val-data, training images
    in any format listed in docs/how-to/data.md. Patterns such as 'shard-{000..146}.tar' are expanded."""

    val_data: Images = ()
    """Validation images, if --data has training images only."""

    scale: Scale = "paper"
    """Size of the experiment: the paper's, reduced for MiniPlaces (small), or minimal for tests (tiny)."""

    changes: Changes = ()
    """Override values of the recipe, such as optimizer.lr=0.02; `relaylab recipes show` lists their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions(RunOptions):
    """Options that are not part of the recipe: hardware, checkpoints and logging."""

    devices: int = 1
    """Number of processes on this machine, one device each. For several machines, launch with torchrun."""

    restarts: int = 3
    """With several devices: maximum number of restarts from the last checkpoint after a process dies."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto uses GPUs if available."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several devices: replicate the network on each (ddp), or shard its parameters across them (fsdp)."""

    precision: Literal["32", "bf16", "fp16"] = "32"
    """Numerical precision; bf16 and fp16 are mixed precision, fp16 with loss scaling."""

    accumulate: int = 1
    """Split each device's share of the batch into N micro-batches and accumulate their gradients, to save memory."""

    early_release: Switch = False
    """Run each loss's backward pass as soon as the forward pass reaches its head, and free its window's memory before
    the layers above run. The gradients are the same. For relay and isolated windows."""

    batch_norm: Literal["local", "synchronised"] = "local"
    """With several devices: compute batch statistics per device (local), or across all devices (synchronised, GPUs
    only)."""

    memory_format: Literal["channels-last", "contiguous"] = "channels-last"
    """Memory format of feature maps; channels-last is faster on most devices."""

    compile: Switch = False
    """Compile the layers outside overlaps with torch.compile."""

    workers: Number = None
    """Data-loading processes per device (default: this machine's cores divided by the number of devices)."""

    images: Literal["auto", "memory", "disk"] = "auto"
    """Decode all images once into memory, or read them from disk during training; auto uses memory if they fit."""

    save_every: Number = None
    """Also save a checkpoint every N iterations (default: only after each evaluation)."""

    keep: Number = None
    """Number of recent checkpoints to keep, excluding the best one (default: 2 during training, 1 once finished)."""

    log_every: int = 20
    """Log training metrics every N iterations."""

    diagnose_every: int = 500
    """Log gradient statistics (magnitudes per layer and segment, cosines between losses) every N iterations; 0 disables
    it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(RuntimeOptions):
    """Train a recipe, or resume a run.

    Training can be interrupted at any time (Ctrl-C, SIGTERM, a power cut) and resumed with --resume.

    Each run has a folder with its configuration, environment, metrics (JSON lines and TensorBoard), checkpoints, log
    and, once finished, a model file for `relaylab predict` and `relaylab export`.
    """

    seed: int = 0
    """Random seed for weights, batches, augmentation and dropout."""

    out: Folder = None
    """Folder of the run; must be new or empty (default: runs/RECIPE/TIME-sSEED)."""

    resume: Resume = None
    """Resume a run: its folder, one of its checkpoints, or "auto" for the newest run with the same options (a new run
    if there is none)."""

    given: Annotated[frozenset[str], tyro.conf.Suppress] = field(default=frozenset(), compare=False)


def option_problems(options: RuntimeOptions) -> list[str]:
    """Return error messages for values below their minimum, and for options that exclude each other."""
    least = {"devices": 1, "restarts": 0, "accumulate": 1, "workers": 0, "save_every": 1, "keep": 1}
    problems = too_small(options, **least, log_every=1, diagnose_every=0, seed=0)
    if options.early_release and options.strategy == "fsdp":
        problems.append("--early-release does not support --strategy fsdp, which shards parameters: use --strategy ddp")
    return problems


def name_of(options: RunOptions) -> str:
    """Return the name of a recipe, or the stem of its file, followed by its scale."""
    name = Path(options.recipe).stem if options.recipe and is_file(options.recipe) else f"{options.recipe}"
    return name if options.scale == "paper" else f"{name}-{options.scale}"
