"""Gradient statistics during training: magnitudes per layer and segment, cosines between losses (Figure 1).

Note [Gradient statistics]
1. Magnitudes are computed from the gradients that the update uses: as in the paper's Figure 1, the mean absolute
   gradient of each layer, and its ratio to the mean absolute weight.
2. Where windows overlap, the gradient of each loss is computed by `torch.autograd.grad` on the graph of the training
   step, before its backward pass: without a second forward pass, random numbers or updates of batch statistics. With
   and without statistics, training is bitwise identical.
3. Cosines need the graph twice, which compiled code does not support, and unsharded parameters, which FSDP does not
   have; in these cases they are omitted.
4. With several processes, cosines are computed from the images of the first process.
"""

import itertools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from relaylab.train.engine import allow_autograd_grad, whole
from relaylab.train.segments import Segments

Groups = dict[str, dict[str, float]]  # values by layer, segment or overlap, and name


def overlap_cosines(relay: nn.Module, losses: Mapping[str, Tensor], segments: Segments) -> Groups:
    """Return the cosines between the gradients of losses that train the same layers. See Note [Gradient statistics] 2.

    Args:
        relay: the training module.
        losses: losses by name, from a forward pass in training mode; their graph is retained.
        segments: segments of the parameters of `relay`.

    Returns:
        Cosines by segment and pair of losses, such as "aux, primary". Pairs with a zero gradient are omitted.
    """
    overlaps = segments.overlaps
    parameters = dict(relay.named_parameters())
    gradients: dict[tuple[str, str], Tensor] = {}
    for loss, value in losses.items():
        names = [name for name, segment in segments.of.items() if loss in overlaps.get(segment, ())]
        if not names:
            continue
        inputs = [parameters[name] for name in names]
        with allow_autograd_grad():
            grads = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        by_segment: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, grads, strict=True):
            gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
            by_segment.setdefault(segments.of[name], []).append(gradient.flatten())
        gradients |= {(segment, loss): torch.cat(parts) for segment, parts in by_segment.items()}
    pairs = [(segment, *pair) for segment, names in overlaps.items() for pair in itertools.combinations(names, 2)]
    rows: list[Tensor] = []
    for segment, first, second in pairs:
        a, b = gradients[segment, first], gradients[segment, second]
        norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
        rows.append(torch.stack([norms, torch.dot(a, b) / norms]))
    cosines: Groups = {}
    values: list[list[float]] = torch.stack(rows).tolist() if rows else []  # a single synchronisation
    for (segment, first, second), (norm, cosine) in zip(pairs, values, strict=True):
        if norm > 0:
            cosines.setdefault(segment, {})[f"{first}, {second}"] = cosine
    return cosines


def statistics(relay: nn.Module, segments: Segments, cosines: Groups) -> dict[str, Groups]:
    """Return the gradient statistics of a step, after its backward pass.

    Returns:
        "layers" and "segments": by weight layer and by segment, "gradient" (the mean absolute gradient) and "ratio"
        (its ratio to the mean absolute weight); "cosines", if there are any.
    """
    layers, by_segment = magnitudes(relay, segments)
    return {"layers": layers, "segments": by_segment} | ({"cosines": cosines} if cosines else {})


def magnitudes(relay: nn.Module, segments: Segments) -> tuple[Groups, Groups]:
    """Return gradient magnitudes by weight layer and by segment. See `statistics`."""
    named = {name: p for name, p in relay.named_parameters() if p.grad is not None}
    tensors = [(cast(Tensor, p.grad), p.detach()) for p in named.values()]
    norms = [torch.stack([whole(torch.linalg.vector_norm(t, 1)) for t in pair]) for pair in tensors]
    sums: list[list[float]] = torch.stack(norms).tolist()
    layers: dict[str, dict[str, float]] = {}
    totals: dict[str, list[float]] = {}
    for (name, parameter), (gradient, weight) in zip(named.items(), sums, strict=True):
        if parameter.ndim > 1:
            layer = name.removeprefix("model.").removesuffix(".weight")
            layers[layer] = {"gradient": gradient / parameter.numel(), "ratio": _ratio(gradient, weight)}
        total = totals.setdefault(segments.of[name], [0.0, 0.0, 0.0])
        for index, amount in enumerate((gradient, weight, parameter.numel())):
            total[index] += amount
    by_segment = {name: {"gradient": g / n, "ratio": _ratio(g, w)} for name, (g, w, n) in totals.items()}
    return layers, by_segment


def _ratio(gradient: float, weight: float) -> float:
    return gradient / weight if weight > 0 else 0.0
