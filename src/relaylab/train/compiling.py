"""torch.compile outside overlaps and away from the boundaries of windows (docs/decisions/003)."""

from typing import Any

import torch

from relaybackprop import Relay
from relaylab.train.segments import Segments


def compile_outside_overlaps(relay: Relay, segments: Segments, **options: Any) -> list[str]:
    """Compile in place the largest modules that hold no boundary and that one loss trains.

    Single layers are skipped: compiling them gains nothing. `options` are those of torch.compile.

    Returns:
        The names of the compiled modules.
    """
    boundaries = {f"model.{boundary.module}" for boundary in relay.plan.boundaries}
    compiled: list[str] = []
    for name, module in relay.named_modules():
        if not name.startswith(("model", "heads.")) or any(name.startswith(f"{done}.") for done in compiled):
            continue
        inside = [own for own in segments.of if own.startswith(f"{name}.")]
        has_boundary = any(f"{boundary}.".startswith(f"{name}.") for boundary in boundaries)
        is_layer = not any(True for _ in module.children())
        if is_layer or has_boundary or not inside or any(segments.of[own] in segments.overlaps for own in inside):
            continue
        module.compile(**options)
        compiled.append(name)
    # All of them share the code of nn.Module's call, and the compiler gives up on code that it compiles too often.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(compiled))
    return compiled
