"""torch.compile for the layers outside overlaps and window boundaries (docs/decisions/003)."""

from typing import Any

import torch

from relaybackprop import Relay
from relaylab.train.segments import Segments


def compile_outside_overlaps(relay: Relay, segments: Segments, **options: Any) -> list[str]:
    """Compile in place the largest modules that contain no window boundary and that only one loss trains.

    Single layers are skipped, since compiling them brings no speed-up.

    Args:
        relay: the training module.
        segments: segments of the relay's parameters.
        **options: keyword arguments of `torch.compile`.

    Returns:
        The names of the compiled modules.
    """
    boundaries = {f"model.{boundary.module}" for boundary in relay.plan.boundaries}
    compiled: list[str] = []
    for name, module in relay.named_modules():
        if not name.startswith(("model", "heads.")) or any(name.startswith(f"{done}.") for done in compiled):
            continue
        inside = [parameter for parameter in segments.of if parameter.startswith(f"{name}.")]
        has_boundary = any(f"{boundary}.".startswith(f"{name}.") for boundary in boundaries)
        is_layer = not any(True for _ in module.children())
        if (
            is_layer
            or has_boundary
            or not inside
            or any(segments.of[parameter] in segments.overlaps for parameter in inside)
        ):
            continue
        module.compile(**options)
        compiled.append(name)
    # All modules share the code object of nn.Module.__call__, and Dynamo gives up on code recompiled too often.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(compiled))
    return compiled
