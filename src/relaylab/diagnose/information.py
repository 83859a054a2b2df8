"""Per-image activations and gradients of each layer, and the class information in them.

Note [Gradients of single images]
1. In evaluation mode, the images of a batch are independent, so that each row of the gradient of the *summed* loss with
   respect to a layer's output is the gradient of one image.
2. A layer's output is the output of its convolution or fully connected layer, before the activation. A hook on this
   tensor receives its gradient even if an in-place ReLU overwrites it.
3. Maps are average-pooled to 2 x 2, and vectors longer than 256 are projected by a fixed random matrix. Gradients are
   normalised to length 1, since their lengths differ by orders of magnitude between images.
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
    """The result of a probe for one layer.

    Attributes:
        layer: name of the layer.
        source: "activations", or the loss of the gradients.
        trained: whether the layer is in the window of the loss; always true for activations.
        bits: lower bound on the information about the class.
    """

    layer: str
    source: str
    trained: bool
    bits: Interval


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return convolutions and fully connected layers by name, from lowest to highest."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def collect(relay: Relay, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Return activations and gradients of all weight layers. See Note [Gradients of single images].

    Args:
        relay: network, heads and windows. Its mode is restored afterwards.
        batches: normalised images (batch, 3, h, w) and labels (batch,).
        seed: seed of the random projections.

    Returns:
        float32 (images, features) by layer and source. Layers above a loss have no gradients of it.
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
            for count, (loss, output) in enumerate(outputs.items(), 1):
                source = loss  # the loss of the gradients that the hooks now receive
                total = functional.cross_entropy(output, labels, reduction="sum")
                torch.autograd.grad(total, seen, retain_graph=count < len(outputs))
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
    """Fit a linear probe for each layer and source on one half of the images and evaluate it on the other.

    Args:
        features: features from `collect`.
        labels: (images,).
        trained: names of the layers that each loss trains.
        seed: seed of the split into halves.
        task: reports progress, in probes.
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
    layers: dict[str, set[str]] = {}
    for name, segment in segments.of.items():
        for loss in segments.losses[segment]:
            layers.setdefault(loss, set()).add(name.removeprefix("model.").removesuffix(".weight"))
    return layers


def _vector(tensor: Tensor, layer: str, seed: int, *, unit: bool) -> Tensor:
    """Return one vector of at most `LENGTH` features per image."""
    if tensor.ndim == 4:
        height, width = (min(FIELDS, side) for side in tensor.shape[-2:])
        tensor = functional.adaptive_avg_pool2d(tensor, (height, width))
    vectors = tensor.flatten(1)
    if vectors.shape[1] > LENGTH:
        vectors = vectors @ _projection(vectors.shape[1], layer, seed).to(vectors)
    if unit:
        vectors = functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)
    return vectors.cpu()


def _projection(length: int, layer: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(layer.encode()))
    return torch.randn(length, LENGTH, generator=generator) / length**0.5
