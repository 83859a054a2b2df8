"""The training loop: updates, with validation, checkpoints and metrics in between.

Note [Loop]
1. Every random number of a step is a function of (seed, step, process): crops, flips and all other augmentation through
   the draws' numbers, and all else (dropout, and what a model may ask of Python or NumPy) because all generators are
   seeded anew for each step. A run resumes exactly without the generators' states, and all schemes see the same random
   numbers.
2. One small all-reduce shares a step's losses, errors, gradient norm and requests to stop among the processes. They are
   checked before the update: a value that is not finite never reaches a weight.
3. A checkpoint is written before the validation that is due at its step, and says that it is still due: a run that
   resumes from it validates first. A kill during a long validation loses nothing else.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from relaybackprop import Relay, RelayLoss
from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.mixing import Mixing
from relaylab.errors import NonFiniteLossError
from relaylab.progress import Silent, Task
from relaylab.recipes.schema import PlateauConfig, Recipe
from relaylab.train import checkpoint
from relaylab.train import gradients as diagnosis
from relaylab.train.averaging import Average
from relaylab.train.engine import scaler_of, whole
from relaylab.train.images import Stream
from relaylab.train.meter import Meter
from relaylab.train.metrics import deciding, result_text, top_errors
from relaylab.train.options import TrainOptions
from relaylab.train.records import Records, Values
from relaylab.train.run_folder import values_of
from relaylab.train.schedule import learning_rate
from relaylab.train.seeding import seed_all
from relaylab.train.segments import Segments
from relaylab.train.signals import StopRequest
from relaylab.train.state import Progress, optimizer_tensors
from relaylab.train.validation import Validation

log = logging.getLogger("relaylab.train")

LEAST_SCALE = 1.0  # below it, fp16 overflows because training diverges
REMEDY = "try a smaller optimizer.lr, a warm-up or optimizer.clip_norm"


@dataclass(eq=False)
class Trainer:
    """A training, assembled by `relaylab.train.session`.

    Attributes:
        relay: network, heads and plan.
        module: the same, wrapped by Fabric and DDP or FSDP.
        optimizer: wrapped by Fabric.
        average: of the weights; None without `optimizer.ema_decay`.
        records: metrics of the first process; None in all others.
        checkpoints: their folder.
    """

    fabric: Fabric
    relay: Relay
    module: Any
    criterion: RelayLoss
    optimizer: Any
    recipe: Recipe
    options: TrainOptions
    segments: Segments
    stream: Stream
    augment: Augmentation
    mixing: Mixing
    validation: Validation
    checkpoints: Path
    stop: StopRequest
    average: Average | None = None
    records: Records | None = None
    task: Task = field(default_factory=Silent)
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)

    def run(self) -> bool:
        """Train to the recipe's last iteration, or until a stop is requested.

        Returns:
            Whether the last iteration was reached.

        Raises:
            NonFiniteLossError: a loss or gradient that is not finite, before it reaches a weight.
            SaveError: a checkpoint that cannot be written.
            LabError: images that cannot be used.
        """
        total, progress = self.recipe.optimizer.iterations, self.progress
        batches = iter(self.stream)
        self.module.train()
        stopping, saved = False, progress.step
        save_every = self.options.save_every or self.recipe.optimizer.evaluate_every
        while True:
            is_last = progress.step == total
            due = is_last or (progress.step > 0 and progress.step % self.recipe.optimizer.evaluate_every == 0)
            if progress.step > saved and (due or stopping or progress.step % save_every == 0):
                self.save()
                saved = progress.step
            if stopping and not is_last:
                return False
            if due and progress.validated != progress.step:
                self.validate()
                if is_last:
                    self.save()  # once more: with the results of this validation
            if is_last:
                return True
            began = time.perf_counter()
            stopping = self.step(batches)
            progress.seconds += time.perf_counter() - began

    def step(self, batches: Iterator[Batch]) -> bool:
        """Make one update; return whether a stop is requested."""
        recipe, fabric, progress, parts = self.recipe, self.fabric, self.progress, self.options.accumulate
        seed_all(self.options.seed, progress.step, fabric.global_rank)
        rate = learning_rate(recipe.optimizer, progress.step, progress.plateau.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        every = self.options.diagnose_every
        measures = every > 0 and (progress.step + 1) % every == 0
        cosines: diagnosis.Groups = {}
        totals: dict[str, Tensor] = {}
        for part in range(parts):
            began = time.perf_counter()
            batch = next(batches).to(fabric.device)
            self.meter.waited(time.perf_counter() - began)
            is_last = part == parts - 1
            with fabric.no_backward_sync(self.module, enabled=not is_last):
                values, angles = self.backward(batch, measures and part == 0, is_last)
            cosines |= angles
            totals = {name: totals.get(name, 0.0) + value / parts for name, value in values.items()}
        norm, stopping = self.check_and_count(totals)
        if measures and math.isfinite(norm):
            self.record("gradients", progress.step + 1, diagnosis.statistics(self.relay, self.segments, cosines))
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        size = recipe.optimizer.batch_size
        self.task.advance(1, self.meter.text(size))
        if progress.step % self.options.log_every == 0:
            self.record("train", progress.step, {**self.meter.values(size), "lr": rate})
            self.meter.reset()
        return stopping

    def backward(self, batch: Batch, measures: bool, is_last: bool) -> tuple[dict[str, Tensor], diagnosis.Groups]:
        """Add the gradients of one part of the step's batch to those of the parts before it.

        Returns:
            The losses and the errors (0 to 1) by name; the angles between losses, if `measures`. Errors are against the
            images' own labels, where mixed images have others.
        """
        images, targets = self.mixing(self.augment(batch.images, batch.draws), batch.labels, batch.draws)
        if self.options.memory_format == "contiguous":
            images = images.contiguous()
        if self.options.early_release:
            with self.fabric.autocast():
                result = self.relay.forward_backward(
                    images, target=targets, loss=self.criterion, scale=self.scaled, sync=is_last
                )
            return {**result.terms, **self.errors(result.output.primary, batch.labels)}, {}
        output = self.module(images)
        losses = self.criterion.terms(output, targets)
        weights = self.relay.plan.weights
        weighted = {name: weights[name] * loss for name, loss in losses.items()}
        angles: diagnosis.Groups = {}
        if measures and self.can_see_angles:
            scale = self.scaler.get_scale() if self.scaler else 1.0
            scaled = {name: scale * loss for name, loss in weighted.items()}
            angles = diagnosis.overlap_cosines(self.relay, scaled, self.segments)
        self.fabric.backward(torch.stack(list(weighted.values())).sum() / self.options.accumulate)
        detached = {name: loss.detach() for name, loss in losses.items()}
        return {**detached, **self.errors(output.primary, batch.labels)}, angles

    @staticmethod
    def errors(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the errors of a batch (0 to 1) by name; none for several labels: precision takes many images."""
        return {} if labels.ndim == 2 else top_errors(scores, labels)

    def scaled(self, loss: Tensor) -> Tensor:
        """Scale the loss of one part of a batch for its backward pass."""
        loss = loss / self.options.accumulate
        return loss if self.scaler is None else cast(Tensor, self.scaler.scale(loss))

    def check_and_count(self, metrics: Mapping[str, Tensor]) -> tuple[float, bool]:
        """All-reduce this step's metrics and check them before the update. See Note [Loop] 2.

        Args:
            metrics: of this process: losses and errors by name.

        Returns:
            The norm of the gradient, infinite where fp16 has overflowed and the scaler skips the update; and whether
            a stop is requested.

        Raises:
            NonFiniteLossError: a loss or gradient that is not finite.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer.optimizer)
        gradients = [p.grad for p in self.relay.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        stop = torch.full((), float(bool(self.stop)), device=norm.device)
        own = torch.stack([*metrics.values(), norm, stop])
        *values, size, stopping = cast(Tensor, self.fabric.all_reduce(own, reduce_op="mean")).tolist()
        means: dict[str, float] = dict(zip(metrics, values, strict=True))
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        may_overflow = self.scaler is not None and self.scaler.get_scale() >= LEAST_SCALE  # the scaler skips that step
        if wrong or not (math.isfinite(size) or may_overflow):
            raise self._not_finite(wrong)
        clip = self.recipe.optimizer.clip_norm
        if clip is not None and math.isfinite(size):
            torch.nn.utils.clip_grads_with_norm_(self.relay.parameters(), clip, norm)
        self.meter.count(means, size)
        return size, stopping > 0

    def _not_finite(self, losses: Sequence[str]) -> NonFiniteLossError:
        """The error for an update that must not be made, created by all processes together."""
        gradients = ((name, p.grad) for name, p in self.relay.named_parameters() if p.grad is not None)
        layers = [name for name, gradient in gradients if not bool(whole(gradient).isfinite().all())]
        parts = ", ".join(dict.fromkeys(self.segments.of[name] for name in layers))
        what = [f"the loss {name}" for name in losses]
        what += [f"the gradients of segment {parts} (from {layers[0]} on)"] if layers else []
        step = self.progress.step + 1
        return NonFiniteLossError(f"step {step}: not finite: {' and '.join(what)}. This update was not made; {REMEDY}")

    def record(self, kind: str, step: int, values: Values) -> None:
        """Write a line of metrics in the first process."""
        if self.records is not None:
            self.records.write(kind, step, values)

    def validate(self) -> None:
        """Validate, and update the schedule.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        progress, schedule = self.progress, self.recipe.optimizer.schedule
        with self.meter.stopped():
            found = self.validation(self.relay, lambda done: self.task.advance(0, f"validating, {done:.0%}"))
            found |= self.validate_average()
        if not math.isfinite(found["loss"]):
            what = f"the loss on the validation images is {found['loss']}"
            raise NonFiniteLossError(f"step {progress.step}: {what}; {REMEDY}")
        progress.last, progress.validated = {"step": progress.step, **found}, progress.step
        error = deciding(found).name
        if not progress.best or found[error] < progress.best[error]:
            progress.best = progress.last
        drops = progress.plateau.drops
        if isinstance(schedule, PlateauConfig):
            progress.plateau = progress.plateau.after(found[error], schedule.patience)
        self.record("val", progress.step, {**found, "seconds": round(progress.seconds, 3)})
        log.info("step %d: val. %s", progress.step, result_text(found))
        if self.average is not None:
            log.info("step %d: with averaged weights: val. %s", progress.step, result_text(found, "ema_"))
        if progress.plateau.drops > drops:
            rate = learning_rate(self.recipe.optimizer, progress.step, progress.plateau.drops)
            log.info("step %d: the error has stopped falling; learning rate %g", progress.step, rate)

    def validate_average(self) -> dict[str, float]:
        """Validate the averaged weights, if there are any."""
        if self.average is None:
            return {}
        with self.average.swapped():
            found = self.validation(
                self.relay, lambda done: self.task.advance(0, f"validating the average, {done:.0%}")
            )
        return {f"ema_{name}": value for name, value in found.items()}

    def save(self) -> None:
        """Write a checkpoint, in all processes together: each may hold a part of the parameters.

        Raises:
            SaveError: it cannot be written.
        """
        with self.meter.stopped():
            model = {name: whole(tensor) for name, tensor in self.relay.state_dict().items()}
            moments = optimizer_tensors(self.relay, self.optimizer.optimizer)
            moments |= {} if self.average is None else self.average.state()
            if self.records is not None:
                path = checkpoint.write(self.checkpoints, checkpoint.Checkpoint(model, moments, self.state_dict()))
                best = [int(self.progress.best["step"])] if self.progress.best else []
                is_finished = self.progress.validated == self.recipe.optimizer.iterations
                checkpoint.thin_out(self.checkpoints, self.options.keep or (1 if is_finished else 2), best)
                log.debug("saved %s", path)

    def state_dict(self) -> dict[str, Any]:
        """Return everything in a checkpoint except the tensors."""
        return {
            **asdict(self.progress),
            "stream": self.stream.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "meter": self.meter.state_dict(),
            "seed": self.options.seed,
            "processes": self.fabric.world_size,
            "recipe": values_of(self.recipe),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint's state.

        Raises:
            InputError: it belongs to other images.
        """
        self.progress = Progress.from_state(state)
        self.stream.load_state_dict(state["stream"])
        self.meter.load_state_dict(state["meter"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    @property
    def scaler(self) -> "torch.amp.GradScaler | None":
        """The loss scaler; None without fp16."""
        return scaler_of(self.fabric)

    @property
    def can_see_angles(self) -> bool:
        """Whether angles can be measured. See Note [Diagnosis] 3 in `relaylab.train.gradients`."""
        options = self.options
        has_graph = not options.compile and not options.early_release and options.strategy != "fsdp"
        return has_graph and self.records is not None
