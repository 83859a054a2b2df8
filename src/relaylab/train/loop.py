"""The training loop, with validation, checkpoints and metrics.

Note [Loop]
1. All randomness of a step is a function of (seed, step, process): augmentation is keyed by the index of the draw, and
   all generators (dropout, Python, NumPy) are reseeded before each step. A run resumes exactly without generator
   states, and all schemes see the same random numbers.
2. One small all-reduce shares a step's losses, errors, gradient norm and stop requests among the processes. The host
   reads the result, its only synchronisation with the device in a step, and checks it before the update, so that a
   non-finite value never reaches a weight. To read it a step later, the device would have to mask the update: zero
   gradients do not suffice, since weight decay and momentum still change the weights, and not all optimizers accept a
   flag. The read costs little: the next batch has been fetched by then (4).
3. The checkpoint of a step is written before its validation, and records that validation is pending: a run that resumes
   from it validates first. If the process is killed during a long validation, only the validation is lost.
4. The kernels of a step run asynchronously on a GPU. The host fetches the next batch (Note [Stream] in
   `relaylab.train.stream`) after it has launched them, and only then waits for the metrics in item 2.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
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
from relaylab.train import checkpoint, gradients
from relaylab.train.averaging import Average
from relaylab.train.engine import scaler_of, whole
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
from relaylab.train.stream import Stream
from relaylab.train.validation import Validation

log = logging.getLogger("relaylab.train")

LEAST_SCALE = 1.0  # below this loss scale, fp16 overflows because training diverges
REMEDY = "try a smaller optimizer.lr, a warm-up or optimizer.clip_norm"


@dataclass(eq=False)
class Trainer:
    """The state of a training run, assembled by `relaylab.train.session`.

    Attributes:
        relay: network, heads and plan.
        module: `relay` wrapped by Fabric and DDP or FSDP.
        optimizer: the optimizer, wrapped by Fabric.
        checkpoints: folder of the checkpoints.
        average: moving average of the weights; None without `optimizer.ema_decay`.
        records: metrics; None except in the first process.
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
            NonFiniteLossError: a loss or gradient is not finite. The update was not made.
            SaveError: a checkpoint cannot be written.
            LabError: images cannot be read.
        """
        total, progress = self.recipe.optimizer.iterations, self.progress
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
                    self.save()  # again, to include the results of this validation
            if is_last:
                return True
            began = time.perf_counter()
            stopping = self.step()
            progress.seconds += time.perf_counter() - began

    def step(self) -> bool:
        """Make one update. Return whether a stop has been requested."""
        recipe, fabric, progress, parts = self.recipe, self.fabric, self.progress, self.options.accumulate
        self.fetch()  # only in the first step: the others find their batch
        seed_all(self.options.seed, progress.step, fabric.global_rank)
        rate = learning_rate(recipe.optimizer, progress.step, progress.plateau.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        every = self.options.diagnose_every
        measures = every > 0 and (progress.step + 1) % every == 0
        cosines: gradients.Groups = {}
        totals: dict[str, Tensor] = {}
        for part in range(parts):
            batch = next(self.stream)
            is_last = part == parts - 1
            with fabric.no_backward_sync(self.module, enabled=not is_last):
                values, new_cosines = self.backward(batch, measures and part == 0, is_last)
            cosines |= new_cosines
            totals = {name: totals.get(name, 0.0) + value / parts for name, value in values.items()}
            if not is_last or progress.step + 1 < recipe.optimizer.iterations:
                self.fetch()  # while the device executes this step; see Note [Loop] 4
        norm, stopping = self.check_and_count(totals)
        if measures and math.isfinite(norm):
            self.record("gradients", progress.step + 1, gradients.statistics(self.relay, self.segments, cosines))
        self.update(norm)
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

    def fetch(self) -> None:
        """Fetch the next batch, unless this has been done, and measure the time."""
        began = time.perf_counter()
        self.stream.fetch()
        self.meter.waited(time.perf_counter() - began)

    def backward(self, batch: Batch, measures: bool, is_last: bool) -> tuple[dict[str, Tensor], gradients.Groups]:
        """Run the forward and backward pass of one micro-batch, accumulating gradients.

        Returns:
            Losses and errors (0 to 1) by name; the cosines between losses if `measures`, otherwise empty. With mixup
            or CutMix, errors refer to the labels of the unmixed images.
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
        cosines: gradients.Groups = {}
        if measures and self.supports_cosines:
            scaled = {name: self.scaler.scale(loss) if self.scaler else loss for name, loss in weighted.items()}
            cosines = gradients.overlap_cosines(self.relay, scaled, self.segments)
        self.fabric.backward(torch.stack(list(weighted.values())).sum() / self.options.accumulate)
        detached = {name: loss.detach() for name, loss in losses.items()}
        return {**detached, **self.errors(output.primary, batch.labels)}, cosines

    @staticmethod
    def errors(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the errors of a batch (0 to 1) by name; empty for multi-label images: mAP needs more than a batch."""
        return {} if labels.ndim == 2 else top_errors(scores, labels)

    def scaled(self, loss: Tensor) -> Tensor:
        """Scale the loss of one micro-batch for its backward pass."""
        loss = loss / self.options.accumulate
        return loss if self.scaler is None else cast(Tensor, self.scaler.scale(loss))

    def check_and_count(self, metrics: Mapping[str, Tensor]) -> tuple[float, bool]:
        """All-reduce this step's metrics and check them before the update. See Note [Loop] 2.

        Args:
            metrics: losses and errors of this process by name.

        Returns:
            The gradient norm, not finite if fp16 has overflowed and the update has to be skipped; and whether a stop
            has been requested.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer.optimizer)
        grads = [p.grad for p in self.relay.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        stop = torch.full((), float(bool(self.stop)), device=norm.device)
        one = torch.ones_like(norm)
        scale = one if self.scaler is None else cast(Tensor, self.scaler.scale(one))  # `get_scale` would synchronise
        local = torch.stack([*metrics.values(), norm, stop, scale])
        reduced = cast(Tensor, self.fabric.all_reduce(local, reduce_op="mean"))
        *values, mean_norm, stopping, mean_scale = reduced.tolist()
        means: dict[str, float] = dict(zip(metrics, values, strict=True))
        non_finite = [name for name, value in means.items() if not math.isfinite(value)]
        may_overflow = self.scaler is not None and mean_scale >= LEAST_SCALE  # `update` skips that step
        if non_finite or not (math.isfinite(mean_norm) or may_overflow):
            raise self._not_finite(non_finite)
        clip = self.recipe.optimizer.clip_norm
        if clip is not None and math.isfinite(mean_norm):
            torch.nn.utils.clip_grads_with_norm_(self.relay.parameters(), clip, norm)
        self.meter.count(means, mean_norm)
        return mean_norm, stopping > 0

    def update(self, norm: float) -> None:
        """Update the weights. With fp16, skip the update if the gradient norm is not finite, and adapt the loss scale.

        `GradScaler.step` would synchronise to read whether gradients have overflowed; their norm has been read already.
        """
        if self.scaler is None:
            self.optimizer.step()
            return
        if math.isfinite(norm):
            self.optimizer.optimizer.step()
        self.scaler.update()

    def _not_finite(self, losses: Sequence[str]) -> NonFiniteLossError:
        """Create the error for non-finite losses or gradients. A collective: all processes must call it."""
        named = ((name, p.grad) for name, p in self.relay.named_parameters() if p.grad is not None)
        layers = [name for name, gradient in named if not bool(whole(gradient).isfinite().all())]
        names = ", ".join(dict.fromkeys(self.segments.of[name] for name in layers))
        sources = [f"the loss {name}" for name in losses]
        sources += [f"the gradients of segment {names} (from {layers[0]} on)"] if layers else []
        step = self.progress.step + 1
        return NonFiniteLossError(
            f"step {step}: non-finite values in {' and '.join(sources)}. The update was not made; {REMEDY}"
        )

    def record(self, kind: str, step: int, values: Values) -> None:
        """Write a line of metrics in the first process."""
        if self.records is not None:
            self.records.write(kind, step, values)

    def validate(self) -> None:
        """Validate, and update the schedule.

        Raises:
            NonFiniteLossError: the validation loss is not finite.
        """
        progress, schedule = self.progress, self.recipe.optimizer.schedule
        with self.meter.stopped():
            results = self.validation(self.relay, lambda done: self.task.advance(0, f"validating, {done:.0%}"))
            results |= self.validate_average()
        if not math.isfinite(results["loss"]):
            raise NonFiniteLossError(f"step {progress.step}: the validation loss is {results['loss']}; {REMEDY}")
        progress.last, progress.validated = {"step": progress.step, **results}, progress.step
        error = deciding(results).name
        if not progress.best or results[error] < progress.best[error]:
            progress.best = progress.last
        drops = progress.plateau.drops
        if isinstance(schedule, PlateauConfig):
            progress.plateau = progress.plateau.after(results[error], schedule.patience)
        self.record("val", progress.step, {**results, "seconds": round(progress.seconds, 3)})
        classes = self.recipe.network.num_classes
        log.info("step %d: val. %s", progress.step, result_text(results, classes))
        if self.average is not None:
            log.info("step %d: averaged weights: val. %s", progress.step, result_text(results, classes, "ema_"))
        if progress.plateau.drops > drops:
            rate = learning_rate(self.recipe.optimizer, progress.step, progress.plateau.drops)
            log.info("step %d: plateau reached; learning rate %g", progress.step, rate)

    def validate_average(self) -> dict[str, float]:
        """Validate the averaged weights, if there are any."""
        if self.average is None:
            return {}
        with self.average.swapped():
            results = self.validation(
                self.relay, lambda done: self.task.advance(0, f"validating the average, {done:.0%}")
            )
        return {f"ema_{name}": value for name, value in results.items()}

    def save(self) -> None:
        """Write a checkpoint. A collective: each process may hold a shard of the parameters.

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
                checkpoint.prune(self.checkpoints, self.options.keep or (1 if is_finished else 2), best)
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
            InputError: the checkpoint belongs to different images.
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
    def supports_cosines(self) -> bool:
        """Whether cosines can be measured. See Note [Gradient statistics] 3 in `relaylab.train.gradients`."""
        options = self.options
        has_graph = not options.compile and not options.early_release and options.strategy != "fsdp"
        return has_graph and self.records is not None
