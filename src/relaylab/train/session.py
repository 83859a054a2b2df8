"""Train a request in this process: set-up and checks, the training loop, and the model file."""

import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import nn

from relaybackprop import Relay
from relaylab.errors import InputError, LabError, NonFiniteLossError, raise_all
from relaylab.models.building import build_criterion, build_relay
from relaylab.models.file import InputConfig, ModelFile, save_model
from relaylab.models.losses import BinaryCrossEntropy
from relaylab.models.pretrained import load_pretrained
from relaylab.outside.folders import refuse_links
from relaylab.outside.reading import typed
from relaylab.progress import Silent, Task, progress
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.train import averaging, checkpoint, failures, requests, run_folder
from relaylab.train.compiling import compile_outside_overlaps
from relaylab.train.devices import precision_warnings
from relaylab.train.engine import make_fabric, whole
from relaylab.train.images import RunImages, crops_of, mixing_of, open_images
from relaylab.train.loop import Trainer
from relaylab.train.meter import Meter
from relaylab.train.metrics import TOP, informative_tops, result_text
from relaylab.train.normalisation import REMEDY, has_local_batch_norm
from relaylab.train.optimizers import build_optimizer, state_tensors
from relaylab.train.options import TrainOptions
from relaylab.train.records import Records, logging_to
from relaylab.train.segments import UNTRAINED, Segments, segment_problems, segments_of, window_warnings
from relaylab.train.signals import StopRequest, stopping
from relaylab.train.state import State, load_tensors
from relaylab.train.stream import Stream
from relaylab.train.torchrun import environment_number, launch_id, restart_count
from relaylab.train.validation import Validation

log = logging.getLogger("relaylab.train")
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

SECONDS_BETWEEN_LINES = 20.0  # where stderr is not a terminal


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training run.

    Attributes:
        folder: the run folder.
        finished: whether the last iteration of the recipe was reached.
        interrupted: whether a stop was requested, even if only during the last validation.
        step: number of updates made.
        last: step, errors and loss of the last validation.
        best: step, errors and loss of the validation with the lowest error.
    """

    folder: Path
    finished: bool
    interrupted: bool
    step: int
    last: dict[str, float]
    best: dict[str, float]


def train(
    request: requests.Request,
    *,
    task: Task | None = None,
    first: AbstractContextManager[object] | None = None,
    stop: StopRequest | None = None,
    runs: int = 1,
) -> Outcome:
    """Train in this process, which may be one of several started by torchrun.

    Args:
        request: a request from `relaylab.train.requests.resolve`.
        task: reports progress; None for a bar or lines on stderr. With a task, only warnings are logged to stderr.
        first: a lock held while images are listed and decoded, for callers that train several runs concurrently.
        stop: the caller's stop request, if the caller handles signals.
        runs: number of concurrent runs that share the device.

    Raises:
        InputError: invalid options or images, or insufficient hardware; raised before the first step.
        LabError: a later failure; the run can be resumed from its last checkpoint.

    Example:
        >>> outcome = train(resolve(TrainOptions(recipe="digits")))
        >>> outcome.folder / "model.safetensors"
    """
    fabric = make_fabric(request.options)
    with ExitStack() as stack:
        stop = stack.enter_context(stopping()) if stop is None else stop
        folder, path = _agree(fabric, request, stack, logging.INFO if task is None else logging.WARNING)
        with _logging_failure(fabric, folder):
            return _train(fabric, replace(request, folder=folder, checkpoint=path), stop, task, first, runs)


def _agree(fabric: Fabric, request: requests.Request, stack: ExitStack, level: int) -> tuple[Path, Path | None]:
    """Return the folder and the checkpoint to resume from, chosen by the first process and broadcast to the others."""
    agreed: tuple[Path, Path | None] | None = None
    if fabric.is_global_zero:
        folder = request.folder
        if folder is None and restart_count():
            folder = run_folder.find_launch(request.options, launch_id())
        folder = folder or run_folder.new_folder(request.options)
        refuse_links(folder)
        stack.enter_context(run_folder.locked(folder))
        stack.enter_context(logging_to(folder, level))
        (folder / failures.FILE).unlink(missing_ok=True)
        run_folder.record_start(folder, request.recipe, {"launch": launch_id(), **_where(fabric, request.options)})
        agreed = folder, _newest(folder, request)
    else:
        stack.enter_context(logging_to(None))
    return cast("tuple[Path, Path | None]", fabric.broadcast(agreed))


def _newest(folder: Path, request: requests.Request) -> Path | None:
    if request.checkpoint is not None and not restart_count():
        checkpoint.check(request.checkpoint)
        return request.checkpoint
    path = checkpoint.newest_valid(folder / run_folder.CHECKPOINTS)
    if path is None and any(checkpoint.newest(folder / run_folder.CHECKPOINTS)):
        raise LabError(f"all checkpoints in {folder / run_folder.CHECKPOINTS} are damaged: start a new run")
    return path


@contextmanager
def _logging_failure(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Log errors and remove the folder of a run that failed before it started."""
    try:
        yield
    except (OSError, LabError) as error:
        failure = _as_lab_error(folder, error)
        log.error("%s", failure)
        if fabric.is_global_zero:
            run_folder.remove_unstarted(folder)
        raise failure from None
    except Exception:
        log.exception("an unexpected error")  # only in the log file: the command line prints one line
        raise


def _as_lab_error(folder: Path, error: OSError | LabError) -> LabError:
    if isinstance(error, LabError):
        return error
    last = next(checkpoint.newest(folder / run_folder.CHECKPOINTS), None)
    more = "" if last is None else f"; {last.name} is saved: relaylab train --resume {shlex.quote(str(folder))}"
    return LabError(f"cannot read or write {error.filename or f'files in {folder}'}: {error.strerror or error}{more}")


def _train(
    fabric: Fabric,
    request: requests.Request,
    stop: StopRequest,
    task: Task | None,
    first: AbstractContextManager[object] | None,
    runs: int,
) -> Outcome:
    options, recipe, folder = request.options, request.recipe, request.folder
    assert folder is not None
    is_first = fabric.is_global_zero
    segments = segments_of(recipe)
    raise_all(segment_problems(recipe.optimizer, segments))
    images = open_images(
        recipe,
        options,
        device=fabric.device,
        devices_here=environment_number("LOCAL_WORLD_SIZE", 1),
        fault_file=folder / "unreadable-images.txt",
        first=first or fabric.rank_zero_first(local=True),
        sources=request.images,
        runs=runs,
    )
    if is_first and not (folder / run_folder.CONFIG).exists():
        resolved = replace(options, images="memory" if images.in_memory else "disk")
        about = {
            "classes": images.classes,
            "keys": images.identity.keys,
            "counts": images.counts(),
            "view": asdict(images.crop_spec),
        }
        if images.has_several_labels:  # "counts" are then of labels, not images
            about["images"] = images.sizes()
        about["segments"] = {name: len(segments.parameters(name)) for name in segments.losses}
        run_folder.write_config(folder, resolved, recipe, about)
    trainer = assemble(fabric, request, images, segments, stop)
    if request.checkpoint is None and not images.in_memory:
        trainer.validation.read_all()
    state = _resume(trainer, request.checkpoint)
    at = trainer.progress
    if is_first:
        _check_space(folder, trainer)
        trainer.records = Records(folder, at.step, validated=at.validated == at.step)
    # `relaylab compare` has printed these warnings once for all its runs, which pass a task
    _log_start(trainer, folder, segments, state, logging.WARNING if task is None else logging.INFO)
    try:
        with _watched(is_first, recipe, at.step, task) as trainer.task:
            finished = trainer.run()
    except (OSError, LabError) as error:
        if is_first:
            kind = "diverged" if isinstance(error, NonFiniteLossError) else "failed"
            with suppress(OSError):  # the disk may be full
                text = str(_as_lab_error(folder, error))
                failures.write_failure(folder, failures.Failure(kind, at.step, text))
        raise
    finally:
        if trainer.records is not None:
            trainer.records.close()
    if finished:
        _write_model(folder / run_folder.MODEL, trainer, images)
        if trainer.average is not None:
            with trainer.average.swapped():
                _write_model(folder / run_folder.AVERAGED, trainer, images, "ema_")
        log.info("finished: %s", folder)
    elif is_first:
        by, resume = stop.signal or "a signal to another process", f"relaylab train --resume {shlex.quote(str(folder))}"
        log.warning("stopped by %s after step %d, which is saved. Resume with:\n  %s", by, at.step, resume)
    return Outcome(folder, finished, not finished or bool(stop), at.step, at.last, at.best)


def assemble(
    fabric: Fabric, request: requests.Request, images: RunImages, segments: Segments, stop: StopRequest
) -> Trainer:
    """Build a trainer with initial weights, which the seed determines, and without records.

    Raises:
        InputError: the batch cannot be divided among the processes.
    """
    options, recipe = request.options, request.recipe
    torch.manual_seed(options.seed)  # the same initial weights in all processes and for all schemes
    relay = build_relay(recipe)
    if recipe.network.pretrained and request.checkpoint is None:
        for line in load_pretrained(relay.model, Path(recipe.network.pretrained)):
            log.info("%s", line)
    if options.batch_norm == "synchronised" and fabric.world_size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(relay)
    if (
        options.memory_format == "channels-last" and options.strategy != "fsdp"
    ):  # FSDP cannot shard channels-last parameters
        relay.to(memory_format=torch.channels_last)  # pyright: ignore
    relay.to(fabric.device)
    for name in segments.parameters(UNTRAINED):  # DDP would wait for their gradients
        relay.get_parameter(name).requires_grad_(False)
    if options.compile:
        compiled = compile_outside_overlaps(relay, segments)
        log.info("compiled: %s", ", ".join(compiled) or "nothing: all modules contain an overlap or a window boundary")
    module = fabric.setup_module(relay)
    optimizer = build_optimizer(relay, segments, recipe.optimizer)
    criterion = build_criterion(recipe.loss, images.counts()["train"]).to(fabric.device)
    augment = images.augmentation(recipe, options.seed).to(fabric.device)
    sampler = images.sampler(recipe, options.seed, fabric.global_rank, fabric.world_size)
    raise_all(requests.batch_problems(recipe, options, fabric.world_size))
    size = recipe.optimizer.batch_size // (fabric.world_size * options.accumulate)
    stream = Stream(images.train, sampler, size, options.seed, crops_of(recipe), fabric.device)
    decay, has_several = recipe.optimizer.ema_decay, images.has_several_labels
    validation = Validation(images.val, augment, BinaryCrossEntropy() if has_several else nn.CrossEntropyLoss(), fabric)
    return Trainer(
        fabric=fabric,
        relay=relay,
        module=module,
        criterion=criterion,
        optimizer=fabric.setup_optimizers(optimizer),
        recipe=recipe,
        options=options,
        segments=segments,
        stream=stream,
        augment=augment,
        mixing=mixing_of(recipe, options.seed),
        validation=validation,
        checkpoints=(request.folder or Path()) / run_folder.CHECKPOINTS,
        stop=stop,
        meter=Meter(() if has_several else tuple(TOP), informative_tops(recipe.network.num_classes)),
        average=None if decay is None else averaging.Average(relay, decay),
    )


def _resume(trainer: Trainer, path: Path | None) -> Mapping[str, Any]:
    """Load the checkpoint, if any, and return its state."""
    if path is None:
        return {}
    loaded = checkpoint.read(path)
    typed(loaded.state, State, str(path / checkpoint.STATE))
    if changes := run_folder.value_changes(loaded.state["recipe"], trainer.recipe, path):
        raise InputError(f"{path} does not match the recipe {trainer.recipe.name}: {'; '.join(changes[:5])}")
    moments = {name: tensor for name, tensor in loaded.optimizer.items() if not name.endswith(averaging.SUFFIX)}
    load_tensors(trainer.relay, trainer.optimizer.optimizer, loaded.model, moments)
    if trainer.average is not None:
        trainer.average.load(loaded.optimizer)
    try:
        trainer.load_state_dict(loaded.state)
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if isinstance(error, LabError):
            raise
        raise InputError(f"{path} does not match this run: {type(error).__name__}: {error}") from None
    return loaded.state


def _log_start(trainer: Trainer, folder: Path, segments: Segments, state: Mapping[str, Any], level: int) -> None:
    recipe = trainer.recipe
    parts = trainer.fabric.world_size * trainer.options.accumulate
    if parts == recipe.optimizer.batch_size and has_local_batch_norm(trainer.relay):
        log.warning("batch normalisation computes its statistics over micro-batches of one image; %s", REMEDY)
    for text in (*precision_warnings(trainer.options), *window_warnings(recipe, segments)):
        log.log(level, "warning: %s", text)
    if state:
        log.info("resuming from step %d of %s", trainer.progress.step, folder)
        now, before = trainer.fabric.world_size, state["processes"]
        if now != before:
            effect = "the order of summation and the dropout masks differ"
            log.warning("the number of processes changed from %d to %d, so %s", before, now, effect)
    else:
        log.info("%s, %s, seed %d: %s", recipe.name, SCHEMES[recipe.scheme], trainer.options.seed, folder)


def _watched(is_first: bool, recipe: Recipe, done: int, task: Task | None) -> AbstractContextManager[Task]:
    """Return the caller's task, or a progress bar in the first process."""
    if task is not None:
        task.advance(done)
    if task is not None or not is_first:
        return nullcontext(task or Silent())
    return progress("train", recipe.optimizer.iterations, done=done, every_s=SECONDS_BETWEEN_LINES)


def _where(fabric: Fabric, options: TrainOptions) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else None
    names = ("strategy", "accumulate", "early_release", "compile", "memory_format")
    settings = {name: getattr(options, name) for name in names}
    threads = torch.get_num_threads()
    return {"processes": fabric.world_size, "device": gpu or "cpu", "threads": threads, "options": settings}


def _check_space(folder: Path, trainer: Trainer) -> None:
    """Raise an InputError if the disk has no space for two checkpoints, rather than fail after hours of training."""
    averages = trainer.average is not None
    copies = 1 + state_tensors(trainer.recipe.optimizer) + averages
    needed = sum(p.numel() * p.element_size() for p in trainer.relay.parameters()) * copies
    needed += sum(b.numel() * b.element_size() for b in trainer.relay.buffers()) * (1 + averages)
    free = shutil.disk_usage(folder).free
    if free < needed * 2:  # the old checkpoint is removed after the new one is written
        raise InputError(
            f"checkpoints need {needed * 2 / 1e6:,.0f} MB (two of {needed / 1e6:,.0f} MB); {folder} has "
            f"{free / 1e6:,.0f} MB free: free some space, or choose a different folder with --out"
        )


def _write_model(path: Path, trainer: Trainer, images: RunImages, prefix: str = "") -> None:
    """Write the model file: the trained network without its auxiliary heads.

    `prefix` selects the metrics of averaged weights.
    """
    relay, recipe = trainer.relay, trainer.recipe
    assert isinstance(relay, Relay)
    state = {name: whole(tensor).detach().cpu() for name, tensor in relay.model.state_dict().items()}
    if not trainer.fabric.is_global_zero:
        return
    mean, last = images.statistics.mean, trainer.progress.last
    scale, mean_image = trainer.augment.scale, trainer.augment.mean.cpu()  # copies: the module stays on its device
    about = f"{recipe.name}, seed {trainer.options.seed}, step {trainer.progress.step}"
    model = ModelFile(
        network=recipe.network,
        classes=images.classes,
        keys=images.identity.keys,
        numbered=images.identity.numbered,
        input=InputConfig(
            resize=recipe.images.short_side,
            crop=recipe.network.image_size,
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=None if scale is None else tuple((1 / scale.cpu()).tolist()),
        ),
        state=state,
        mean_image=mean_image if mean_image.ndim == 3 else None,
        about=f"{about}: val. {result_text(last, len(images.classes), prefix)}",
        has_several_labels=images.has_several_labels,
    )
    save_model(path, model)
