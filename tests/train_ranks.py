"""What each of two processes runs for test_train_distributed.py, started by torchrun: trainings one after another."""

import json
import sys
from pathlib import Path

import torch

from relaylab.train import loop, requests, session
from relaylab.train.options import TrainOptions

STEPS = ("optimizer.iterations=6", "optimizer.evaluate_every=3", "network.num_classes=5")
# Nothing random but the images, and nothing that sees the batch as a whole. A head of one layer has no dropout either.
PLAIN = (*STEPS, "plan.auxiliary.aux.head=linear", "augmentation.divide=true")
PIXELS = ("crop=resized", "padding=2", "policy=trivialaugment", "erasing=0.5")
AUGMENTED = tuple(f"augmentation.{value}" for value in PIXELS)
ADAMW = (  # whose updates do not magnify the last digits of small gradients, with this eps
    "optimizer.algorithm=adamw", "optimizer.lr=0.001", "optimizer.eps=0.01", "optimizer.ema_decay=0.6",
    "optimizer.decay_norms_and_biases=false", "optimizer.layer_decay=0.9", "loss.class_weights=square-root",
)  # fmt: skip
SCENARIOS: dict[str, dict[str, object]] = {
    "ddp": {"changes": PLAIN},
    "ddp, two parts": {"changes": PLAIN, "accumulate": 2},
    "early release": {"changes": PLAIN, "early_release": True, "accumulate": 2},
    "fsdp": {"changes": PLAIN, "strategy": "fsdp"},
    "ddp, adamw": {"changes": (*PLAIN, *ADAMW)},
    "fsdp, adamw": {"changes": (*PLAIN, *ADAMW), "strategy": "fsdp"},
    "augmentation": {"changes": (*PLAIN, *AUGMENTED)},
    "mixing": {"changes": (*PLAIN, *AUGMENTED, "augmentation.mixup=1", "augmentation.cutmix=1")},
    "several labels": {"changes": (*PLAIN, "loss.function=binary", "images.sampling=shuffled")},
    "dropout": {"changes": STEPS},
    "dropout, from disk": {"changes": STEPS, "images": "disk", "workers": 1},
}
STOPPED = ("mixing", "dropout", "dropout, from disk", "early release", "fsdp", "fsdp, adamw")
STOP_AT = 4


def config_of(name: str, tree: Path, out: Path, **more: object) -> TrainOptions:
    """A scenario's options."""
    options = {"recipe": "table3-model-a-relay", "scale": "tiny", "data": (tree,), "workers": 0, **SCENARIOS[name]}
    if name == "several labels":
        options |= {"data": (tree, tree.parent / "train.csv"), "val_data": (tree, tree.parent / "val.csv")}
    return TrainOptions(**{**options, "out": out, "accelerator": "cpu", "diagnose_every": 2, "keep": 9, **more})


def write_lists(tree: Path) -> None:
    """Write lists of the tree's images with several labels beside it; one process has a validation image more."""
    for part in ("train", "val"):
        names = sorted(path.relative_to(tree) for path in (tree / part).rglob("*.png"))[part == "val" :]
        labels = [f"{name.parts[1]};class{number % 3}" for number, name in enumerate(names)]
        lines = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
        (tree.parent / f"{part}.csv").write_text("\n".join(["image,labels", *lines]))


def without_dropout() -> None:
    """For networks that are built from now on."""
    torch.nn.Dropout.forward = lambda self, input: input


def main(tree: Path, folder: Path) -> None:
    original_step, original_dropout = loop.Trainer.step, torch.nn.Dropout.forward

    def stopping(self: loop.Trainer) -> bool:
        return original_step(self) or self.progress.step == STOP_AT

    for name in SCENARIOS:
        if not name.startswith("dropout"):
            without_dropout()
        session.train(requests.resolve(config_of(name, tree, folder / name)))
        if name in STOPPED:
            loop.Trainer.step = stopping
            session.train(requests.resolve(config_of(name, tree, folder / f"{name}, stopped")))
            loop.Trainer.step = original_step
            session.train(requests.resolve(TrainOptions(resume=str(folder / f"{name}, stopped"))))
        torch.nn.Dropout.forward = original_dropout
    (folder / f"done-{torch.distributed.get_rank()}.json").write_text(json.dumps(list(SCENARIOS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
