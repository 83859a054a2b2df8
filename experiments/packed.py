"""Many runs at once on one GPU: the step of each is a CUDA graph, and their replays share the card.

Note [Packing]
1. A small network leaves most of a GPU idle, and to launch the hundreds of kernels of its step takes longer than to run
   them. Here a whole step (crops, augmentation, forward and backward pass, update) is recorded once for each run and
   then replayed, on a stream of the run's own: what one leaves idle, the others take.
2. All that changes from step to step is on the device: the number of the step, the draws (`experiments.shelf`), the
   learning rates. Losses are kept there too, and read when the run is evaluated.
3. A run is what `relaylab train` makes of the same recipe and seed: the same first weights, batches, crops, flips and
   colours, the same update. Only dropout draws its masks by generators of its own, one for each layer, so that all runs
   of a seed have the same ones. A test compares the two.
4. Without a GPU steps are not recorded, only made: slow, and for tests.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shelf import Shelf
from experiments.testing import test_network, write_tested
from experiments.training import FAILED, NotChosenError, Place, Run, claimed, keys_of, run_of
from relaylab.data.keyed import keys
from relaylab.data.parts import InMemory
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.models.building import build_criterion, build_relay
from relaylab.progress import Task, progress
from relaylab.recipes.schema import PlateauConfig
from relaylab.train import gradients as diagnosis
from relaylab.train import runs
from relaylab.train.engine import make_fabric
from relaylab.train.optimizers import parameter_groups
from relaylab.train.records import Records
from relaylab.train.schedule import learning_rate
from relaylab.train.segments import segment_problems, segments_of
from relaylab.train.validation import Validation

WARM_UPS = 3  # steps before one is recorded: libraries choose their algorithms in them
TIMED = 20  # replays


class FilledDropout(nn.Module):
    """Dropout whose random numbers are there before the forward pass. See Note [Packing] 3.

    Args:
        p: share of the values that are dropped.
        generator: of the random numbers.
    """

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = p, generator
        self.numbers: Tensor | None = None

    def fill(self) -> None:
        """New random numbers, for the next forward pass."""
        if self.numbers is not None:
            self.numbers.uniform_(generator=self.generator)

    def forward(self, values: Tensor) -> Tensor:
        """Some values zero and the others larger, in training mode."""
        if not self.training:
            return values
        if self.numbers is None:
            self.numbers = torch.empty(values.shape, device=values.device)
            self.fill()
        return values * (self.numbers >= self.p) / (1 - self.p)


def fill_dropouts(module: nn.Module, device: torch.device) -> list[FilledDropout]:
    """Put a `FilledDropout` in the place of every dropout, in place."""
    found: list[FilledDropout] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                found.append(FilledDropout(child.p, torch.Generator(device)))
                setattr(parent, name, found[-1])
    return found


class PackedRun:
    """One run, with all that its steps need on the device.

    Args:
        run: which.
        shelf: of images.
    """

    def __init__(self, run: Run, shelf: Shelf) -> None:
        self.run, self.device = run, shelf.device
        self.recipe = runs.understand(run.config).recipe
        config = self.recipe.optimizer
        self.supply = shelf.supply(self.recipe, run.seed)
        self.fabric = make_fabric(run.config)
        self.segments = segments_of(self.recipe)
        problems = segment_problems(config, self.segments)
        if isinstance(config.schedule, PlateauConfig):
            problems.append("a plateau schedule looks at errors, which recorded steps cannot: take another schedule")
        if config.algorithm != "sgd":
            problems.append(f"optimizer.algorithm is {config.algorithm}: packed runs record the steps of sgd only")
        if problems:
            raise InputError("; ".join(problems))
        torch.manual_seed(run.seed)
        relay = build_relay(self.recipe)
        self.first = {name: tensor.clone() for name, tensor in relay.state_dict().items()}
        self.relay = relay.to(self.device, memory_format=torch.channels_last)  # pyright: ignore
        self.dropouts = fill_dropouts(self.relay, self.device)
        self.criterion = build_criterion(config)
        rates = [learning_rate(config, step) for step in range(config.iterations)]
        self.rates = torch.tensor(rates, device=self.device)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.relay, self.segments, config),
            torch.zeros((), device=self.device),
            momentum=config.momentum,
            fused=True,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=self.device)  # each its own
        self.made = torch.zeros((), dtype=torch.int64, device=self.device)  # steps
        self.rows = torch.arange(config.batch_size, device=self.device)
        # Of each step, the losses and the gradient's norm.
        self.history = torch.zeros(config.iterations, len(self.relay.plan.windows) + 1, device=self.device)
        self.validation = Validation(self.supply.images.val, self.supply.augment, nn.CrossEntropyLoss(), self.fabric)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.images_per_s: float | None = None
        self.records: Records | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""
        return self.supply.images.classes

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """On the run's own stream."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            yield

    def losses(self) -> dict[str, Tensor]:
        """The losses of the batch whose turn it is, before weighting; their graph is kept."""
        turn = self.made % len(self.rates)  # to time a step, more are made than there are
        images, labels = self.supply.batch(turn * len(self.rows) + self.rows)
        images = self.fabric.strategy.precision.convert_input(images)  # as Fabric's own wrapper of modules does
        with self.fabric.autocast():
            output = self.relay(images)
        auxiliary = {name: scores.float() for name, scores in output.auxiliary.items()}
        whole = output._replace(primary=output.primary.float(), auxiliary=auxiliary)
        return self.criterion.terms(whole, labels)

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses times their weights."""
        return {name: self.relay.plan.weights[name] * loss for name, loss in losses.items()}

    def step(self) -> None:
        """One update. See Note [Packing] 2."""
        self.optimizer.zero_grad()
        losses = self.losses()
        torch.stack(list(self.weighted(losses).values())).sum().backward()
        parameters = [p for p in self.relay.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip = self.recipe.optimizer.clip_norm
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        turn = self.made[None] % len(self.rates)
        rate = self.rates.index_select(0, turn)[0]
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate * group["lr_factor"])
        self.optimizer.step()
        figures = torch.stack([*(loss.detach() for loss in losses.values()), norm])
        self.history.index_copy_(0, turn, figures[None])
        self.made += 1

    def record(self) -> None:
        """Record a step, find out how long it takes by itself, and begin anew."""
        self.relay.train()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with self.streamed():
                for _ in range(WARM_UPS):
                    self.step()
            torch.cuda.synchronize(self.device)
            self.optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step()
            self.images_per_s = self._speed()
        self.reset()

    def reset(self) -> None:
        """The first weights, no momentum, no steps made."""
        with torch.no_grad(), self.streamed():
            for name, tensor in self.relay.state_dict().items():
                tensor.copy_(self.first[name])
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
            self.made.zero_()
            self.history.zero_()
        for number, dropout in enumerate(self.dropouts):
            dropout.generator.manual_seed(int(keys(self.run.seed, number)[0] >> 1))

    def begin(self) -> None:
        """Make the run's folder, and write down what is going to be trained."""
        folder = self.run.folder
        if folder.exists():
            shutil.rmtree(folder)  # of one that was broken off
        folder.mkdir(parents=True)
        runs.describe(folder, self.run.config, self.recipe, {"classes": self.classes})
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        runs.note_start(folder, self.recipe, {"device": gpu, "packed": True})
        self.records = Records(folder, 0)

    def replay(self) -> None:
        """The next step; on a GPU nobody waits for it."""
        with self.streamed():
            for dropout in self.dropouts:
                dropout.fill()
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()

    def look(self, step: int, since: int) -> bool:
        """Write down how it goes.

        Args:
            step: steps that have been made.
            since: at the last look.

        Returns:
            Whether losses, gradients and weights have been finite; if not, that is the run's result.
        """
        assert self.records is not None
        with self.streamed():
            weights = torch.nn.utils.get_total_norm(list(self.relay.parameters()))
            *figures, size = torch.cat([self.history[since:step].mean(0), weights[None]]).tolist()
            losses = dict(zip(self.relay.plan.windows, figures, strict=False))
            speed = {} if self.images_per_s is None else {"images_per_s": round(self.images_per_s)}
            angles = self._angles() if step < self.run.iterations else {}
            found: dict[str, Mapping[str, Any]] = {
                "train": {"loss": losses, "gradient_norm": figures[-1], **speed},
                "gradients": diagnosis.statistics(self.relay, self.segments, angles),
                "val": self.validation(self.relay) if math.isfinite(size) else {},
            }
        if not all(map(math.isfinite, (size, *_numbers(found)))):
            write_text(self.run.folder / FAILED, f"losses, gradients or weights are not finite by step {step}\n")
            self.records.close()
            return False
        for kind, values in found.items():
            self.records.write(kind, step, values)
        return True

    def finish(self) -> None:
        """Test the network on training and validation images."""
        assert self.records is not None
        self.records.close()
        train, val = self.supply.images.train, self.supply.images.val
        assert isinstance(train, InMemory)
        assert isinstance(val, InMemory)

        def score(images: Tensor) -> Tensor:
            return self.relay(self.supply.augment(images)).float()

        with self.streamed():
            self.relay.eval()
            self.supply.augment.eval()
            write_tested(self.run, test_network(score, self.relay.model, train, val))

    def _angles(self) -> diagnosis.Groups:
        """Of the next batch; not of networks whose statistics would count it twice."""
        if any(isinstance(module, nn.BatchNorm2d) for module in self.relay.modules()):
            return {}
        return diagnosis.overlap_cosines(self.relay, self.weighted(self.losses()), self.segments)

    def _speed(self) -> float:
        """Images a second while no other run uses the card."""
        assert self.graph is not None
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.streamed():
            began.record()
            for _ in range(TIMED):
                self.graph.replay()
            ended.record()
        ended.synchronize()
        return 1000 * TIMED * len(self.rows) / began.elapsed_time(ended)


def train_packed(groups: Sequence[str], place: Place, at_once: int) -> None:
    """Train what is not done yet and what no other process is training, so many runs at once.

    Args:
        groups: of arms.
        place: where.
        at_once: the most runs that share the device.

    Raises:
        InputError: what is wrong with recipes or images; runs that have checkpoints of `relaylab train`.
        NotChosenError: learning rates depend on runs that are not in these groups.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    shelf: Shelf | None = None
    while True:
        with ExitStack() as stack:
            mine: list[Run] = []
            for run in _missing(groups, place):
                is_alike = not mine or run.iterations == mine[0].iterations
                if len(mine) < at_once and is_alike and stack.enter_context(claimed((run.arm, run.seed), place)):
                    mine.append(run)
            if not mine:
                return
            wave = [run for run in mine if not run.is_done]  # another process may have ended some meanwhile
            if not wave:
                continue
            for run in wave:
                _check_not_begun(run.folder)
            shelf = shelf or Shelf(device, wave[0].config)
            task = stack.enter_context(progress("train", len(wave) * wave[0].iterations))
            _train([PackedRun(run, shelf) for run in wave], task)
            shelf.clear()


def _missing(groups: Sequence[str], place: Place) -> list[Run]:
    """The runs that are not done, as far as their learning rates are known."""
    missing: list[Run] = []
    unknown: NotChosenError | None = None
    for key in keys_of(groups):
        try:
            run = run_of(*key, place)
        except NotChosenError as error:
            unknown = error
            continue
        if not run.is_done:
            missing.append(run)
    if unknown is not None and not missing:
        raise unknown
    return missing


def _check_not_begun(folder: Path) -> None:
    """Runs begin anew here, which must not cost anybody a checkpoint."""
    if (folder / runs.CHECKPOINTS).exists():
        raise InputError(f"{folder} was begun without --at-once: end it without, or remove the folder")


def _train(packed: list[PackedRun], task: Task) -> None:
    """Several runs of the same number of iterations, to their end."""
    for each in packed:
        each.record()
        each.begin()
    total, step = packed[0].run.iterations, 0
    while step < total and packed:
        since, step = step, min(total, step + packed[0].recipe.optimizer.evaluate_every)
        for _ in range(step - since):
            for each in packed:
                each.replay()
        packed = [each for each in packed if each.look(step, since)]
        task.advance(len(packed) * (step - since), note=f"{len(packed)} runs at once")
    for each in packed:
        each.finish()


def _numbers(value: Any) -> Iterator[float]:
    """All numbers of nested mappings."""
    for part in value.values() if isinstance(value, Mapping) else ():
        yield from [part] if isinstance(part, float) else _numbers(part)
