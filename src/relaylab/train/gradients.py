"""Gradient statistics during training: magnitudes per layer and segment, cosines between losses (Figure 1).

Note [Diagnosis]
1. Magnitudes are those of the gradients that the update uses. The paper's Figure 1 has the mean absolute gradient of
   each layer, and its ratio to the mean absolute weight.
2. Where windows overlap, each loss's own gradient comes from `torch.autograd.grad` on the graph of the step itself,
   before its backward pass: no second forward pass, no random numbers, no batch statistics updated twice. Training is
   the same bit for bit with and without them.
3. That uses the graph twice, which compiled code does not allow, and whole parameters, which FSDP does not have: there
   the cosines are left out.
4. With several processes, cosines are those of the first one's own images.
"""

import itertools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from relaylab.train.engine import looking, whole
from relaylab.train.segments import Segments

Groups = dict[str, dict[str, float]]  # numbers of each layer, segment or overlap


def overlap_cosines(relay: nn.Module, losses: Mapping[str, Tensor], segments: Segments) -> Groups:
    """Return the cosines between losses' gradients where they train the same layers. See Note [Diagnosis] 2.

    Args:
        relay: whose parameters the segments name.
        losses: by name, of a forward pass in training mode; their graph is kept.
        segments: of the parameters.

    Returns:
        By segment and pair, "aux, primary"; a pair with a gradient of zero is left out.
    """
    overlaps = segments.overlaps
    parameters = dict(relay.named_parameters())
    gradients: dict[tuple[str, str], Tensor] = {}
    for loss, value in losses.items():
        names = [name for name, segment in segments.of.items() if loss in overlaps.get(segment, ())]
        if not names:
            continue
        own = [parameters[name] for name in names]
        with looking():
            found = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
        by_segment: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, found, strict=True):
            gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
            by_segment.setdefault(segments.of[name], []).append(gradient.flatten())
        gradients |= {(segment, loss): torch.cat(parts) for segment, parts in by_segment.items()}
    cosines: Groups = {}
    for segment, names in overlaps.items():
        for one, other in itertools.combinations(names, 2):
            a, b = gradients[segment, one], gradients[segment, other]
            lengths = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
            if lengths > 0:
                cosines.setdefault(segment, {})[f"{one}, {other}"] = float(torch.dot(a, b) / lengths)
    return cosines


def statistics(relay: nn.Module, segments: Segments, cosines: Groups) -> dict[str, Groups]:
    """Return the gradient statistics of a step, after its backward pass; without "cosines" if there are none.

    "layers" and "segments" have, by weight layer and by segment, "gradient", the mean absolute gradient, and "ratio",
    its ratio to the mean absolute weight.
    """
    layers, by_segment = sizes(relay, segments)
    return {"layers": layers, "segments": by_segment} | ({"cosines": cosines} if cosines else {})


def sizes(relay: nn.Module, segments: Segments) -> tuple[Groups, Groups]:
    """Return gradient magnitudes by weight layer and by segment. See `statistics`."""
    named = {name: p for name, p in relay.named_parameters() if p.grad is not None}
    tensors = [(cast(Tensor, p.grad), p.detach()) for p in named.values()]
    norms = [torch.stack([whole(torch.linalg.vector_norm(t, 1)) for t in pair]) for pair in tensors]
    found: list[list[float]] = torch.stack(norms).tolist()
    layers: dict[str, dict[str, float]] = {}
    totals: dict[str, list[float]] = {}
    for (name, parameter), (gradient, weight) in zip(named.items(), found, strict=True):
        if parameter.ndim > 1:
            layer = name.removeprefix("model.").removesuffix(".weight")
            layers[layer] = {"gradient": gradient / parameter.numel(), "ratio": _ratio(gradient, weight)}
        total = totals.setdefault(segments.of[name], [0.0, 0.0, 0.0])
        for place, amount in enumerate((gradient, weight, parameter.numel())):
            total[place] += amount
    by_segment = {name: {"gradient": g / n, "ratio": _ratio(g, w)} for name, (g, w, n) in totals.items()}
    return layers, by_segment


def _ratio(gradient: float, weight: float) -> float:
    return gradient / weight if weight > 0 else 0.0
