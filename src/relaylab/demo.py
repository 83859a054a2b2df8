"""The demo: one network, three ways to train it, measured side by side."""

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaybackprop import LinearHead, Plan, Relay, RelayLoss, RelayOutput, Window
from relaylab.data.augment import Augmentation
from relaylab.demo_data import ImageSet, make_sampler
from relaylab.errors import NonFiniteLossError
from relaylab.models.layers import classifier, initialise
from relaylab.options import DemoConfig
from relaylab.progress import Task

MOMENTUM, WEIGHT_DECAY = 0.9, 2e-4  # the paper's, section 5.1
LR_DROPS = (0.7, 0.9)  # DEVIATION: the paper divides by 10 when the error stops falling; fixed points need no patience
GRADIENT_BATCH = 256
VALIDATION_BATCH = 64  # larger ones fall out of a CPU's cache
SCHEMES = {"standard": "standard BP", "multi_loss": "multi-loss + standard BP", "relay": "Relay BP"}


@dataclass
class Run:
    """One scheme trained from one seed.

    Attributes:
        scheme: its key in `SCHEMES`.
        seed: of weights, batches, crops and dropout.
        depths: by loss, the number of weight layers in its window, the paper's N.
        epochs: by epoch, the mean training loss of the main classifier and the validation errors in per cent.
        gradients: "start" and "end": by weight layer, the mean absolute gradient and weight on a fixed batch.
        seconds: time spent in training steps.
    """

    scheme: str
    seed: int
    depths: dict[str, int] = field(default_factory=dict[str, int])
    epochs: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    gradients: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict[str, dict[str, dict[str, float]]])
    seconds: float = 0.0


def build_network(channels: int, classes: int, config: DemoConfig) -> nn.Sequential:
    """A plain VGG in the shape of the paper's model A: segments that end in max-pooling, then three fc layers.

    No batch normalisation, He's initialisation. The last segment keeps its map of at least 2x2 (the paper's ends in a
    pooling pyramid). Model A has five segments for 224 pixels; 8 pixels have room for three.
    """
    side, width = cast(int, config.size), cast(int, config.width)
    count = min(5, int(math.log2(side)))
    parts = OrderedDict[str, nn.Module]()
    for number in range(count):
        filters = width * min(2**number, 8)
        layers = OrderedDict[str, nn.Module]()
        for i in range(1, cast(int, config.convs) + 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"relu{i}"] = nn.ReLU()
            channels = filters
        if number < count - 1:
            layers["pool"] = nn.MaxPool2d(2)
            side //= 2
        parts[f"segment{number + 1}"] = nn.Sequential(layers)
    parts["classifier"] = classifier(channels * side * side, 8 * width, classes)
    network = nn.Sequential(parts)
    initialise(network)
    return network


def relay_plan(network: nn.Sequential) -> Plan:
    """The paper's Table 2: head and overlap at the last segment but one."""
    segments = [name for name, _ in network.named_children() if name.startswith("segment")]
    return Plan(primary=Window(bottom=segments[-2]), auxiliary={"aux": Window(top=segments[-2])})


def schemes(plan: Plan) -> dict[str, Plan]:
    """The three rows of the paper's Table 3."""
    return {"standard": plan.standard(), "multi_loss": plan.multi_loss(), "relay": plan}


def build(scheme: str, data: ImageSet, config: DemoConfig, seed: int) -> Relay:
    """The network under one scheme. One seed gives all schemes the same network, and both heads the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(3, len(data.classes), config)
        plan = relay_plan(network)
        channels = next(m.out_channels for m in reversed(list(_segment(network, plan))) if isinstance(m, nn.Conv2d))
        # The library's AuxiliaryHead has 2 million weights, more than this whole network; the smallest head will do.
        head = LinearHead(channels, len(data.classes))
        initialise(head)
        network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    plan = schemes(plan)[scheme]
    return Relay(network, plan, {"aux": head} if plan.auxiliary else None)


def _segment(network: nn.Sequential, plan: Plan) -> nn.Sequential:
    return cast(nn.Sequential, network.get_submodule(cast(str, plan.auxiliary["aux"].top)))


def train(scheme: str, data: ImageSet, config: DemoConfig, seed: int, task: Task) -> Run:
    """Train one scheme from one seed.

    Args:
        scheme: a key of `SCHEMES`.
        data: what to train on and to validate with.
        config: resolved options.
        seed: of weights, batches, crops and dropout; all schemes see the same ones.
        task: is told of every image trained on.

    Raises:
        NonFiniteLossError: before the update that the loss would have spoilt.
    """
    relay = build(scheme, data, config, seed)
    criterion = RelayLoss(nn.CrossEntropyLoss(), relay.plan)
    optimizer = torch.optim.SGD(relay.parameters(), cast(float, config.lr), MOMENTUM, weight_decay=WEIGHT_DECAY)
    run, augment = Run(scheme, seed), make_augmentation(data, config, seed)
    crops = data.train.training(make_sampler(data, config, seed), cast(int, config.batch_size), seed)
    epochs, step, where = cast(int, config.epochs), 0, f"{SCHEMES[scheme]}, seed {seed}"
    with torch.random.fork_rng(devices=[]):
        run.gradients["start"] = gradient_magnitudes(relay, criterion, data, augment)
        for epoch in range(epochs):
            relay.train()
            augment.train()
            lr = cast(float, config.lr) * 0.1 ** sum(epoch >= drop * epochs for drop in LR_DROPS)
            optimizer.param_groups[0]["lr"] = lr
            total, count, started = 0.0, 0, time.perf_counter()
            for batch in crops:
                images, labels = augment(batch.images, batch.draws), batch.labels
                # Seeded per step, so that the head's dropout cannot shift the masks of the network's own.
                torch.manual_seed(seed * 1_000_003 + step)
                output: RelayOutput = relay(images)
                loss = criterion(output, labels)
                if not math.isfinite(loss.item()):
                    raise NonFiniteLossError(f"the loss is {loss.item()} ({where}, step {step}); try a smaller --lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += functional.cross_entropy(output.primary.detach(), labels, reduction="sum").item()
                step += 1
                count += len(labels)
                task.advance(len(labels))
            run.seconds += time.perf_counter() - started
            run.epochs.append({"lr": lr, "train_loss": total / count, **validate(relay, data, augment)})
            task.advance(0, _note(where, run, epochs))
        run.gradients["end"] = gradient_magnitudes(relay, criterion, data, augment)
    assert relay.plan.binding is not None, "bound by the first step"
    run.depths = dict(relay.plan.binding.depths)
    return run


def _note(where: str, run: Run, epochs: int) -> str:
    last = run.epochs[-1]
    return f"{where}, epoch {len(run.epochs)}/{epochs}: loss {last['train_loss']:.3f}, val. error {last['top1']:.2f} %"


def make_augmentation(data: ImageSet, config: DemoConfig, seed: int) -> Augmentation:
    """The paper's augmentation: flips, colour shifts, and the training images' mean image subtracted.

    DEVIATION: differences are divided by each channel's standard deviation, which lets a network of any size learn at
    the same rate. Digits are neither mirrored nor coloured.
    """
    statistics = data.statistics
    return Augmentation(
        torch.from_numpy(statistics.mean_image),
        torch.from_numpy(statistics.std).clamp(min=1.0),
        seed=seed,
        flip=config.flip,
        components=statistics.components() if config.data else None,
    )


def validate(relay: Relay, data: ImageSet, augment: Augmentation) -> dict[str, float]:
    """Top-1 and top-5 error in per cent, single centre crop. With five classes or fewer, top-5 errors are zero."""
    relay.eval()
    augment.eval()
    wrong = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for batch in data.val.evaluation(VALIDATION_BATCH):
            scores: Tensor = relay(augment(batch.images))
            hits = scores.topk(min(5, scores.shape[1])).indices == batch.labels[:, None]
            wrong += torch.stack([(~hits[:, :1]).all(1).sum(), (~hits).all(1).sum()])
    top1, top5 = (100 * wrong.double() / len(data.val.labels)).tolist()
    return {"top1": top1, "top5": top5}


def gradient_magnitudes(
    relay: Relay, criterion: RelayLoss, data: ImageSet, augment: Augmentation
) -> dict[str, dict[str, float]]:
    """By weight layer, the mean absolute gradient and weight: the paper's Figure 1. The weights stay as they are."""
    rows = np.linspace(0, len(data.train.labels) - 1, min(GRADIENT_BATCH, len(data.train.labels))).astype(np.int64)
    (batch,) = data.train.some(rows).evaluation(len(rows))
    relay.train()
    augment.eval()
    relay.zero_grad()
    torch.manual_seed(0)  # the same dropout masks each time
    criterion(relay(augment(batch.images)), batch.labels).backward()
    magnitudes = {name: _magnitude(layer) for name, layer in weight_layers(relay.model).items()}
    relay.zero_grad()
    return magnitudes


def weight_layers(network: nn.Module) -> Mapping[str, nn.Conv2d | nn.Linear]:
    """Convolutions and fully connected layers by name, from the lowest up."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def _magnitude(layer: nn.Conv2d | nn.Linear) -> dict[str, float]:
    gradient = cast(Tensor, layer.weight.grad)
    return {"gradient": gradient.abs().mean().item(), "weight": layer.weight.detach().abs().mean().item()}


def describe(data: ImageSet, config: DemoConfig, runs: Sequence[Run]) -> dict[str, Any]:
    """The network and the plans as plain values: what the pictures are drawn from."""
    relay = build("relay", data, config, config.seed)
    network, parts = cast(nn.Sequential, relay.model), list[dict[str, str]]()
    for name, part in network.named_children():
        layers = list(weight_layers(part).values())
        if isinstance(layers[-1], nn.Conv2d):
            text = f"{len(layers)} x conv 3x3, {layers[-1].out_channels}" + (", pool" if hasattr(part, "pool") else "")
        else:
            text = "fc " + ", ".join(str(layer.out_features) for layer in layers if isinstance(layer, nn.Linear))
        parts.append({"name": name, "text": text})
    plans: dict[str, Any] = {}
    for scheme, plan in schemes(relay_plan(network)).items():
        windows = {loss: {"top": w.top, "bottom": w.bottom, "weight": w.weight} for loss, w in plan.windows.items()}
        plans[scheme] = {"windows": windows, "depths": next(run.depths for run in runs if run.scheme == scheme)}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shape = {"parts": parts, "layers": len(weight_layers(network)), "parameters": parameters}
    return {"network": shape, "plans": plans}


def images_to_train_on(data: ImageSet, config: DemoConfig) -> int:
    """The size of `compare` in images, each counted as often as it is trained on."""
    batch_size = cast(int, config.batch_size)
    epoch = max(1, len(data.train.labels) // batch_size) * batch_size
    return len(SCHEMES) * cast(int, config.seeds) * cast(int, config.epochs) * epoch


def compare(data: ImageSet, config: DemoConfig, task: Task) -> list[Run]:
    """Train every scheme from every seed.

    Args:
        data: what to train on and to validate with.
        config: resolved options.
        task: is told of every image trained on.
    """
    seeds = range(config.seed, config.seed + cast(int, config.seeds))
    return [train(scheme, data, config, seed, task) for seed in seeds for scheme in SCHEMES]
