"""Activations and gradients of each layer, image by image, and the information about the class in them.

Note [Gradients of single images]
1. In evaluation mode images do not influence one another, so that the gradient of the *sum* of a batch's losses with
   respect to a layer's output holds, row by row, each image's own gradient.
2. A layer's output is that of its convolution or fully connected layer, before the activation; a hook on that tensor
   sees its gradient even where a ReLU overwrites it.
3. Maps are averaged over 2 x 2 fields, and vectors longer than 256 are multiplied by a fixed random matrix. Gradients
   are scaled to length 1: their lengths differ by orders of magnitude from image to image.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaybackprop import Relay
from relaylab.diagnose.probe import readable_bits
from relaylab.evaluate.ensembles import halves
from relaylab.evaluate.error_rates import Interval
from relaylab.progress import Silent, Task
from relaylab.train.segments import Segments

LENGTH, FIELDS = 256, 2
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Reading:
    """A probe's result for one layer."""

    layer: str
    source: str
    """"activations", or the loss whose gradient it is."""
    trained: bool
    """Whether the layer is in the loss's window; always true for activations."""
    bits: Interval
    """Lower bound on the information about the class."""


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return convolutions and fully connected layers by name, from the lowest up."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def collect(relay: Relay, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Return activations and gradients of all weight layers. See Note [Gradients of single images].

    Args:
        relay: network, heads and windows. Its mode is restored afterwards.
        batches: normalised images and labels.
        seed: of the random projection.

    Returns:
        By layer and source, float32 (images, features); layers above a loss have no gradient of it.
    """
    parts: dict[tuple[str, str], list[Tensor]] = {}
    heads: dict[str, Tensor] = {}
    source = ""

    def keep(layer: str, kind: str, tensor: Tensor) -> None:
        parts.setdefault((layer, kind), []).append(_vector(tensor.detach(), layer, seed, unit=kind != ACTIVATIONS))

    def watch(_module: nn.Module, _args: object, output: Tensor, *, layer: str) -> None:
        keep(layer, ACTIVATIONS, output)
        output.register_hook(lambda gradient: keep(layer, source, gradient))

    def attach(_module: nn.Module, _args: object, output: Tensor, *, loss: str) -> None:
        heads[loss] = relay.heads[loss](output)

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    was_training, required = relay.training, [(p, p.requires_grad) for p in relay.parameters()]
    relay.eval()
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for layer, module in weight_layers(relay.model).items():
            hooks.append(module.register_forward_hook(partial(watch, layer=layer)))
        for loss, window in relay.plan.auxiliary.items():
            top = relay.model.get_submodule(str(window.top))
            hooks.append(top.register_forward_hook(partial(attach, loss=loss)))
        for images, labels in batches:
            seen = images.detach().requires_grad_()
            outputs = {"primary": relay.model(seen), **heads}
            for number, (loss, output) in enumerate(outputs.items(), 1):
                source = loss  # whose gradients the hooks now see
                total = functional.cross_entropy(output, labels, reduction="sum")
                torch.autograd.grad(total, seen, retain_graph=number < len(outputs))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in required:
            parameter.requires_grad_(needed)
        relay.train(was_training)
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def read_all(
    features: Mapping[tuple[str, str], Tensor],
    labels: Tensor,
    trained: Mapping[str, set[str]],
    *,
    seed: int = 0,
    task: Task | None = None,
) -> list[Reading]:
    """Fit a linear probe for each layer and source on one half of the images, and test it on the other.

    Args:
        features: from `collect`.
        labels: (images,).
        trained: the layers that each loss trains.
        seed: of the halves.
        task: counts probes.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = [order[half].numpy() for half in halves(labels[order])]
    truth = labels.numpy()
    readings: list[Reading] = []
    for (layer, source), vectors in features.items():
        fit_on, test_on = ((vectors.numpy()[half], truth[half]) for half in parts)
        inside = source == ACTIVATIONS or layer in trained[source]
        readings.append(Reading(layer, source, inside, readable_bits(fit_on, test_on)))
        (task or Silent()).advance(1, note=layer)
    return readings


def trained_layers(segments: Segments) -> dict[str, set[str]]:
    """Return the weight layers of the network that each loss trains."""
    found: dict[str, set[str]] = {}
    for name, segment in segments.of.items():
        for loss in segments.losses[segment]:
            found.setdefault(loss, set()).add(name.removeprefix("model.").removesuffix(".weight"))
    return found


def _vector(tensor: Tensor, layer: str, seed: int, *, unit: bool) -> Tensor:
    """Return one vector of at most `LENGTH` numbers for each image."""
    if tensor.ndim == 4:
        high, wide = (min(FIELDS, side) for side in tensor.shape[-2:])
        tensor = functional.adaptive_avg_pool2d(tensor, (high, wide))
    vectors = tensor.flatten(1)
    if vectors.shape[1] > LENGTH:
        vectors = vectors @ _projection(vectors.shape[1], layer, seed).to(vectors)
    if unit:
        vectors = functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)
    return vectors.cpu()


def _projection(length: int, layer: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(layer.encode()))
    return torch.randn(length, LENGTH, generator=generator) / length**0.5
