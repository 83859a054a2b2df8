"""A1 with `torch.compile`: standard BP compiled as a whole, relay outside of its overlap.

    python -m benchmarks.gpu.compiled NETWORK BATCH DEVICE SIZE FILE

`measure` starts this module in a child process with a time limit, since compiling can take minutes or hang. The child
writes its figures to FILE. Compiled contenders take turns with eager ones on the same weights, which they are first
compared with: on the batch and in the precision that are timed, the gradients of a compiled contender may be at most
`FACTOR` times as far from the eager float32 gradients as the eager contender's, and `TOLERANCE` besides, in the norm of
all gradients together.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.compile import twin
from benchmarks.gpu.session import NO_TIME, Session, WrongGradientsError
from benchmarks.gpu.settings import SIZES, Settings
from benchmarks.gpu.steps import channels_last, in_half_precision
from benchmarks.measure import Figures, Step, clock_of, interleave, ratio
from benchmarks.networks import Subject
from relaybackprop import Relay, RelayLoss
from relaylab.files import write_text
from relaylab.train.compiling import compile_outside_overlaps
from relaylab.train.segments import segments_from

CONTENDERS = ("standard_compiled", "relay_compiled")
FACTOR, TOLERANCE = 2.0, 1e-3
FALLBACK_BATCH = 32  # where A1 has not chosen one
ENTRY = "A1c"


def measure(session: Session, settings: Settings, size: str) -> None:
    """Measure and record the compiled contenders of each network, in a child process with a time limit."""
    for network in settings.compiled:
        names = [f"{network}/{contender}" for contender in CONTENDERS]
        if session.left_s <= 0:
            session.skip(ENTRY, names, NO_TIME)
            continue
        batches = [int(r.figures["batch"]) for r in session.results if r.name == f"{network}/standard" and r.figures]
        batch = batches[0] if batches else settings.batch or FALLBACK_BATCH
        file = session.scratch / f"compiled-{network}.json"
        command = ["benchmarks.gpu.compiled", network, str(batch), session.device, size, str(file)]
        code, output = session.run(command, settings.compile_s)
        found = json.loads(file.read_text()) if file.exists() else {}
        limit = f"not finished within {settings.compile_s:g} s, or the minutes were over"
        reason = limit if code is None else f"exit code {code}: {output[-300:]}"
        for name, contender in zip(names, CONTENDERS, strict=True):
            if contender in found:
                session.measured(ENTRY, name, found[contender])
            else:
                session.skip(ENTRY, [name], reason)


def contenders(subject: Subject, meta_copy: Subject, backend: str) -> dict[str, Step]:
    """Return eager and compiled contenders on the same weights; `meta_copy` is the subject on the meta device."""
    s, criterion = subject, nn.CrossEntropyLoss()
    loss = RelayLoss(criterion)
    relay = Relay(s.model, s.plan, {"aux": s.head})
    whole, outside = twin(s.model), twin(relay)
    whole.compile(backend=backend)
    with torch.random.fork_rng(devices=[]):
        segments = segments_from(Relay(meta_copy.model, s.plan, {"aux": meta_copy.head}), meta_copy.images)
    compile_outside_overlaps(outside, segments, backend=backend)

    def standard(model: nn.Module) -> Step:
        return lambda: criterion(model(s.images), s.labels).backward()

    def by(relay: Relay) -> Step:
        return lambda: loss(relay(s.images), s.labels).backward()

    return {
        "standard": standard(s.model),
        "standard_compiled": standard(whole),
        "relay": by(relay),
        "relay_compiled": by(outside),
    }


def check(subject: Subject, steps: dict[str, Step], name: str) -> None:
    """Compare a compiled contender with the eager one. See the top of this file.

    Raises:
        WrongGradientsError: it is further from the float32 gradients than the tolerance allows.
    """
    eager = name.removesuffix("_compiled")

    def gradients(step: Step) -> list[Tensor]:
        subject.clear()
        step()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in subject.parameters]

    def norm(tensors: Sequence[Tensor]) -> float:
        return torch.nn.utils.get_total_norm(list(tensors)).item()

    right = gradients(steps[eager])
    usual, found = (gradients(in_half_precision(steps[each], subject.images)) for each in (eager, name))
    subject.clear()
    size = norm(right)
    allowed, off = (norm([a - b for a, b in zip(each, right, strict=True)]) / size for each in (usual, found))
    if not off <= FACTOR * allowed + TOLERANCE:
        raise WrongGradientsError(
            f"{name}: gradients are {off:.2g} of their norm off the eager float32 ones, the eager contender's "
            f"{allowed:.2g}; at most {FACTOR} times that and {TOLERANCE} are allowed"
        )


def time(subject: Subject, meta_copy: Subject, settings: Settings, device: str) -> dict[str, Figures]:
    """Return the figures of the compiled contenders.

    Raises:
        WrongGradientsError: one of them computes other gradients than it claims.
    """
    plain = contenders(subject, meta_copy, settings.backend)
    for name in CONTENDERS:
        check(subject, plain, name)
    steps = {name: in_half_precision(step, subject.images) for name, step in plain.items()}
    times = interleave(
        steps,
        rounds=settings.rounds,
        budget_s=settings.budget_s,
        warmup=2,
        min_rounds=2,
        before=subject.clear,
        clock=clock_of(device),
    )
    batch, found = len(subject.images), dict[str, Figures]()
    for name in CONTENDERS:
        over_eager = ratio(times[name], times[name.removesuffix("_compiled")])
        over_standard = ratio(times[name], times["standard_compiled"]) if name != "standard_compiled" else None
        median = statistics.median(times[name])
        found[name] = {
            "batch": batch,
            "ms": 1000 * median,
            "images_per_s": batch / median,
            "time_over_eager": over_eager.median,
            "time_over_eager_error": over_eager.error,
            **({} if over_standard is None else {"time_over_standard_compiled": over_standard.median}),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one network, in the child process."""
    network, batch, device, size, file = sys.argv[1:] if argv is None else argv
    settings = SIZES[size]
    torch.manual_seed(0)
    cast(Any, torch)._dynamo.config.recompile_limit = 64
    build = settings.networks[network]
    subject = channels_last(build(settings.pixels, int(batch), settings.width, device))
    meta_copy = build(settings.pixels, 2, settings.width, "meta")
    write_text(Path(file), json.dumps(time(subject, meta_copy, settings, device)))


if __name__ == "__main__":
    main()
