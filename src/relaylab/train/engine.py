"""Devices, precision and processes: Lightning Fabric, launched by torchrun."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning_fabric import Fabric, wrappers
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from relaybackprop import Relay
from relaylab.errors import FAILED, INTERRUPTED, InputError
from relaylab.train.devices import device_of
from relaylab.train.options import RuntimeOptions
from relaylab.train.torchrun import FAILURE, environment_number, is_launched, noted_failure


def launch(options: RuntimeOptions, arguments: Sequence[str]) -> int:
    """Run a command line with torchrun, in one process per device, and wait for the processes.

    Returns:
        The exit code: the first failed process's, 130 after a signal, otherwise 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    flags = ["--standalone", f"--nproc-per-node={options.devices}", f"--max-restarts={options.restarts}"]
    # Otherwise restarted processes find the addresses of dead ones in the store and wait for them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.devices)))
    with tempfile.TemporaryDirectory(prefix="relaylab-") as folder:
        os.environ[FAILURE] = str(Path(folder) / "failure")
        try:
            run(get_args_parser().parse_args([*flags, "-m", "relaylab", *arguments]))
        except SignalException:
            return INTERRUPTED
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(f"relaylab: process {rank} exited with code {failure.exitcode}; see the error above", file=sys.stderr)
            return noted_failure() or FAILED
        finally:
            failed = noted_failure()
            del os.environ[FAILURE]
    return failed or 0


def make_fabric(options: RuntimeOptions) -> Fabric:
    """Create the Fabric of this process, which may be one of several started by torchrun.

    Raises:
        InputError: devices or batch normalisation that this machine does not support.
    """
    device = device_of(options.accelerator).type
    world, here = (environment_number(name, 1) if is_launched() else 1 for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if device == "cuda" and here > torch.cuda.device_count():
        raise InputError(f"{here} processes, but only {torch.cuda.device_count()} GPUs on this machine")
    if options.batch_norm == "synchronised" and device == "cpu":
        raise InputError("--batch-norm synchronised requires GPUs: use --batch-norm local, or one device")
    fabric = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=max(1, world // here),
        strategy=_strategy(options, device, world),
        plugins=_precision(options, device),
    )
    fabric.launch()
    return fabric


def _strategy(options: RuntimeOptions, device: str, world: int) -> Strategy | str:
    if world == 1:
        if options.strategy == "fsdp":
            raise InputError("--strategy fsdp requires several devices: set --devices")
        return SingleDeviceStrategy(torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    if options.strategy == "fsdp":
        return ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    return DDPStrategy(process_group_backend="nccl" if device == "cuda" else "gloo", gradient_as_bucket_view=True)


def _shard(relay: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply FSDP2 to each child of the network, to each head, and to the whole module."""
    assert isinstance(relay, Relay)
    for part in (*relay.model.children(), *relay.heads.values()):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(relay, mesh=mesh["data_parallel"])
    return relay


def _precision(options: RuntimeOptions, device: str) -> Precision:
    match options.precision:
        case "32":
            return Precision()
        case "bf16":
            return MixedPrecision("bf16-mixed", device)
        case "fp16":  # with an explicit scaler, Fabric does not require a GPU
            return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


@contextmanager
def allow_autograd_grad() -> Iterator[None]:
    """Allow `torch.autograd.grad` within the block, for gradients that the update does not use.

    With mixed precision, Fabric rejects backward passes that it did not start, since their losses might be unscaled.
    """
    before = wrappers._in_fabric_backward  # pyright: ignore[reportPrivateUsage]
    wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        wrappers._in_fabric_backward = before


def scaler_of(fabric: Fabric) -> "torch.amp.GradScaler | None":
    """Return the loss scaler; None without fp16."""
    precision = fabric.strategy.precision
    return precision.scaler if isinstance(precision, MixedPrecision) else None


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, a collective; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
