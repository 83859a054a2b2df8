"""What is said when a loss or a gradient is not finite."""

from collections.abc import Sequence

from torch import nn

from relaylab.errors import NonFiniteLossError
from relaylab.train.engine import whole
from relaylab.train.segments import Segments


def not_finite(step: int, losses: Sequence[str], relay: nn.Module, segments: Segments) -> NonFiniteLossError:
    """The error for an update that must not be made. All processes have to ask for it together.

    Args:
        step: of the update, from 1.
        losses: those that are not finite.
        relay: with the gradients.
        segments: of its parameters.
    """
    gradients = ((name, p.grad) for name, p in relay.named_parameters() if p.grad is not None)
    layers = [name for name, gradient in gradients if not bool(whole(gradient).isfinite().all())]
    parts = list(dict.fromkeys(segments.of[name] for name in layers))
    what = [f"the loss {name}" for name in losses]
    what += [f"the gradients of segment {', '.join(parts)} (from {layers[0]} on)"] if layers else []
    return NonFiniteLossError(
        f"step {step}: not finite: {' and '.join(what)}. This update was not made; try a smaller optimizer.lr, a "
        "warm-up or optimizer.clip_norm"
    )
