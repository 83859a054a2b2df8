"""What each of two processes runs for test_distributed.py: every scenario's gradients, written to a file per rank."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nets import Case, make_case
from oracle import by_loss, gradients_of, losses_of, seed_each_module, smooth_loss, step_gradients, weighted_sum
from relaybackprop import Plan, Relay

WORLD = 2
Gradients = dict[str, Tensor]


def case_of(name: str, rank: int) -> Case:
    """The same weights on every rank, another batch on each."""
    case = make_case(name)
    torch.manual_seed(100 + rank)
    x = case.inputs[0]
    inputs = (torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 11),)
    return Case(case.model, case.plan, case.heads, inputs, case.reaches)


def relay_of(case: Case, scheme: str = "relay") -> Relay:
    plan = {"relay": case.plan, "multi_loss": case.plan.multi_loss()}[scheme]
    return Relay(case.model, plan, case.heads)


def step(module: nn.Module, plan: Plan, case: Case, seed: int = 7) -> None:
    torch.manual_seed(seed)
    weighted_sum(losses_of(by_loss(module(*case.inputs))), plan).backward()


def data_parallel(name: str, rank: int, **options: bool) -> Gradients:
    """Three iterations, since a static graph treats the first one differently; the gradients of the last."""
    case = case_of(name, rank)
    relay = relay_of(case)
    module = DistributedDataParallel(relay, **options)
    for _ in range(3):
        relay.zero_grad()
        step(module, relay.plan, case)
    return gradients_of(relay)


def accumulated(name: str, rank: int) -> Gradients:
    """Two micro-batches, the first under no_sync."""
    case = case_of(name, rank)
    relay = relay_of(case)
    module = DistributedDataParallel(relay)
    with module.no_sync():
        step(module, relay.plan, case)
    step(module, relay.plan, case, seed=8)
    return gradients_of(relay)


def stepped(name: str, rank: int) -> Gradients:
    """`Relay.forward_backward`, which averages itself; two iterations, since the first one searches the graph."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    for _ in range(2):
        relay.zero_grad()
        step_gradients(relay, *case.inputs)
    return gradients_of(relay)


def stepped_in_two_parts(name: str, rank: int) -> Gradients:
    """Two micro-batches, gradients averaged after the second; the first process's batch statistics everywhere."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    for sync in (False, True):
        relay.forward_backward(*case.inputs, target=None, loss=smooth_loss(relay.plan), sync=sync)
    return gradients_of(relay)


def fully_sharded(name: str, rank: int) -> Gradients:
    """FSDP2 on each top-level segment and the root, two iterations."""
    case = case_of(name, rank)
    relay = relay_of(case)
    mesh = init_device_mesh("cpu", (WORLD,))
    segments = case.model if isinstance(case.model, nn.Sequential) else case.model.blocks
    for segment in segments:
        if any(True for _ in segment.parameters()):
            fully_shard(segment, mesh=mesh)
    fully_shard(relay, mesh=mesh)
    for _ in range(2):
        relay.zero_grad()
        step(relay, relay.plan, case)
    return {
        n: torch.zeros(p.shape, dtype=p.dtype) if p.grad is None else p.grad.full_tensor()
        for n, p in relay.named_parameters()
    }


SCENARIOS: dict[str, Callable[[str, int], Gradients]] = {
    "ddp": data_parallel,
    "ddp find_unused_parameters": lambda name, rank: data_parallel(name, rank, find_unused_parameters=True),
    "ddp static_graph": lambda name, rank: data_parallel(name, rank, static_graph=True),
    "ddp no_sync": accumulated,
    "step": stepped,
    "step in two parts": stepped_in_two_parts,
    "fsdp2": fully_sharded,
}
NETS = ["vgg", "resnet", "transformer"]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    results: dict[str, Gradients | str] = {}
    for scenario, run in SCENARIOS.items():
        for name in NETS:
            try:
                results[f"{scenario} {name}"] = run(name, rank)
            except Exception as error:  # reported by the test of this scenario
                results[f"{scenario} {name}"] = f"{type(error).__name__}: {error}"
            dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
