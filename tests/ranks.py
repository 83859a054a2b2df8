"""The scenarios of test_distributed.py, run in each of several processes: gradients, written to a file per rank."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nets import Case, make_case
from oracle import (
    by_loss,
    expected_gradients,
    gradients_of,
    losses_of,
    seed_each_module,
    smooth_loss,
    step_gradients,
    weighted_sum,
)
from relaybackprop import LinearHead, Plan, Relay, Window
from relaybackprop.engine import data_parallel as engine
from relaybackprop.errors import EarlyReleaseError

WORLD = 2
SMALL = 400  # bytes: many buckets for small networks
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


def stepped(name: str, rank: int, bucket: int = engine.BUCKET_BYTES) -> Gradients:
    """`Relay.forward_backward`, which averages itself; later iterations know when gradients are final."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    with mock.patch.multiple(engine, BUCKET_BYTES=bucket, LAST_BUCKET_BYTES=bucket // 4):
        for _ in range(3):
            relay.zero_grad()
            step_gradients(relay, *case.inputs)
    return gradients_of(relay)


def stepped_in_two_parts(name: str, rank: int) -> Gradients:
    """Two micro-batches, gradients averaged after the second; the first process's batch statistics everywhere."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    for _ in range(2):
        relay.zero_grad()
        for sync in (False, True):
            relay.forward_backward(*case.inputs, target=None, loss=smooth_loss(relay.plan), sync=sync)
    return gradients_of(relay)


def stepped_in_pairs(name: str, rank: int) -> Gradients:
    """Averages over pairs of processes."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    groups = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
    for _ in range(3):
        relay.zero_grad()
        relay.forward_backward(*case.inputs, target=None, loss=smooth_loss(relay.plan), sync=groups[rank // 2])
    return gradients_of(relay)


def stepped_frozen(name: str, rank: int) -> Gradients:
    """Other layers frozen in each of the last steps."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    for frozen in FROZEN:
        for number, parameter in enumerate(relay.parameters()):
            parameter.requires_grad_(number not in frozen)
        for _ in range(2):
            relay.zero_grad()
            step_gradients(relay, *case.inputs)
    return gradients_of(relay)


FROZEN = ([], [0, 3], [1])


def overlapped(name: str, rank: int) -> Gradients:
    """The lower windows' gradients leave before the top layer runs, and only the last bucket after it is done."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    log: list[str] = []
    relay.model.get_submodule({"vgg": "fc2"}.get(name, "fc")).register_forward_pre_hook(lambda *_: log.append("top"))
    finish, all_reduce = engine._Average.finish, dist.all_reduce

    def noting_end(average: Any) -> None:
        log.append("end")
        finish(average)

    def noting_send(*args: Any, **kwargs: Any) -> Any:
        log.append("send")
        return all_reduce(*args, **kwargs)

    with mock.patch.object(engine._Average, "finish", noting_end), mock.patch.object(dist, "all_reduce", noting_send):
        for step in range(3):
            relay.zero_grad()
            log.clear()
            step_gradients(relay, *case.inputs)
            assert (log.index("send") < log.index("top")) == (step > 0), log
            assert step == 0 or log[log.index("end") :] == ["end", "send"], log
    return gradients_of(relay)


class Uneven(nn.Module):
    """Layers that are used `times` often, the lower one in two windows if `tied`."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.lower, self.extra, self.middle, self.upper, self.fc = (
            nn.Linear(5, 5, dtype=torch.float64) for _ in range(6)
        )
        self.upper.load_state_dict(self.lower.state_dict())
        if tied:
            self.upper = self.lower
        self.times = {"lower": 1, "extra": 1, "upper": 0}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for name in ("lower", "extra"):
            for _ in range(self.times[name]):
                x = getattr(self, name)(x).tanh()
        x = self.middle(x).tanh()
        for _ in range(self.times["upper"]):
            x = self.upper(x).tanh()
        return self.fc(x)


# By step, how often layers are used on even and on odd ranks; otherwise as in the first step, from which is learnt.
UNEVEN: tuple[tuple[dict[str, int], dict[str, int]], ...] = (
    ({}, {}),
    ({}, {"upper": 1}),  # later than forecast in half of the processes
    ({"extra": 0}, {}),  # less often
    ({"extra": 0}, {"extra": 0}),  # never
    ({"lower": 2, "upper": 2}, {"lower": 0}),
    ({"upper": 1}, {"upper": 1}),
)


def uneven_relay(tied: bool) -> Relay:
    torch.manual_seed(3)
    plan = Plan(Window(bottom="middle"), {"aux": Window(top="middle")})
    return Relay(Uneven(tied), plan, {"aux": LinearHead(5, 4).double()})


def uneven_batch(relay: Relay, rank: int, step: int) -> Tensor:
    """One rank's batch; sets how often layers are used."""
    relay.model.times = {"lower": 1, "extra": 1, "upper": 0} | UNEVEN[step][rank % 2]
    torch.manual_seed(50 * step + rank)
    return torch.randn(3, 5, dtype=torch.float64)


def uneven(step: int, rank: int) -> Gradients:
    """Gradients of a step after those before it."""
    relay = uneven_relay(tied=True)
    for number in range(step + 1):
        relay.zero_grad()
        step_gradients(relay, uneven_batch(relay, rank, number))
    is_unused = all("extra" in times and times["extra"] == 0 for times in UNEVEN[step])
    assert (relay.model.extra.weight.grad is None) == is_unused
    return gradients_of(relay)


def forgetful(rank: int) -> Gradients:
    """A negative control: gradients that come later than forecast are not looked for."""
    relay = uneven_relay(tied=True)
    step_gradients(relay, uneven_batch(relay, rank, 0))
    with mock.patch.object(engine._Average, "_are_late", lambda average: [False] * len(average.parameters)):
        return step_gradients(relay, uneven_batch(relay, rank, 1))


def expected_uneven(step: int, members: Iterable[int]) -> Gradients:
    """Without tied weights: the reference would leave out a weight that is used below a window as well."""
    relay = uneven_relay(tied=False)
    mean = mean_of(expected_gradients(relay, uneven_batch(relay, rank, step)) for rank in members)
    for name in ("weight", "bias"):
        mean[f"model.lower.{name}"] += mean.pop(f"model.upper.{name}")
    return mean


def mean_of(gradients: Iterable[Gradients]) -> Gradients:
    every = list(gradients)
    return {name: sum(one[name] for one in every) / len(every) for name in every[0]}  # pyright: ignore


def optimized(name: str, rank: int, **options: bool) -> Gradients:
    """Parameters after three updates."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    optimizer = torch.optim.AdamW(relay.parameters(), lr=1e-2, **options)
    for _ in range(3):
        step_gradients(relay, *case.inputs)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in relay.named_parameters()}


def expected_optimized(name: str, members: Iterable[int], **options: bool) -> Gradients:
    relay = relay_of(case_of(name, 0))
    seed_each_module(relay)
    optimizer = torch.optim.AdamW(relay.parameters(), lr=1e-2, **options)
    for _ in range(3):
        mean = mean_of([expected_gradients(relay, *case_of(name, rank).inputs) for rank in members])
        for name_of, parameter in relay.named_parameters():
            parameter.grad = mean[name_of]
        optimizer.step()
    return {name: parameter.detach() for name, parameter in relay.named_parameters()}


def refused(name: str, rank: int) -> Gradients:
    """Sparse gradients, and a hook that takes gradients away; then a step that is right."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    embedding = relay.model.embed
    embedding.sparse = True
    for _ in range(2):
        with pytest.raises(EarlyReleaseError, match="sparse=False"):
            step_gradients(relay, *case.inputs)
    embedding.sparse = False
    hook = relay.model.fc.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(EarlyReleaseError, match=r"a hook of the parameter 'model.fc.weight'"):
        step_gradients(relay, *case.inputs)
    hook.remove()
    return step_gradients(relay, *case.inputs)


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
    return whole_gradients(relay)


def sharded(relay: Relay, name: str) -> None:
    """FSDP2 on each block, and on one head."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = relay.model if isinstance(relay.model, nn.Sequential) else relay.model.blocks
    inner = [boundary.module for boundary in relay.plan.boundaries]
    for child, block in blocks.named_children():
        full = child if blocks is relay.model else f"blocks.{child}"
        if any(True for _ in block.parameters()) and not any(place.startswith(f"{full}.") for place in inner):
            fully_shard(block, mesh=mesh, reshard_after_forward=int(child[-1]) % 2 == 0)
    fully_shard(next(iter(relay.heads.values())), mesh=mesh)
    assert {type(parameter) for parameter in relay.parameters()} == {nn.Parameter, DTensor}, name


def stepped_fsdp2(name: str, rank: int, *, parts: int = 1, reduce_once: bool = False) -> Gradients:
    """`fully_shard` on blocks, the rest whole; an evaluation before each step leaves blocks gathered."""
    case = case_of(name, rank)
    relay = relay_of(case)
    seed_each_module(relay)
    sharded(relay, name)
    for _ in range(3):
        relay.zero_grad()
        with torch.no_grad():
            relay(*case.inputs)
        for part in range(parts):
            for module in relay.modules() if reduce_once else ():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(part == parts - 1)
            relay.forward_backward(*case.inputs, target=None, loss=smooth_loss(relay.plan), sync=part == parts - 1)
    return whole_gradients(relay)


def whole_gradients(relay: Relay) -> Gradients:
    """Gradients without shards; zeros where there is nothing."""
    gradients: Gradients = {}
    for name, parameter in relay.named_parameters():
        grad = torch.zeros(parameter.shape, dtype=parameter.dtype) if parameter.grad is None else parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return gradients


def refused_fsdp2(name: str, rank: int) -> Gradients:
    """`fully_shard` on a module with a boundary in it, and on all of the relay; another kind of DTensor."""
    case, mesh = case_of(name, rank), init_device_mesh("cpu", (dist.get_world_size(),))
    relay = relay_of(case)
    relay.model.fc.weight = nn.Parameter(distribute_tensor(relay.model.fc.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(EarlyReleaseError, match=r"'model.fc.weight' is a DTensor that was not sharded by fully_shard"):
        step_gradients(relay, *case.inputs)
    for words, module in {"fully_shard on 'model', around 'model.": "model", "on the whole relay": ""}.items():
        relay = relay_of(case_of(name, rank))
        fully_shard(relay.get_submodule(module), mesh=mesh)
        with pytest.raises(EarlyReleaseError, match=words):
            step_gradients(relay, *case.inputs)
    return stepped(name, rank)


NETS = ["vgg", "resnet", "transformer"]
SCENARIOS: dict[str, Callable[[str, int], Gradients]] = {
    "ddp": data_parallel,
    "ddp find_unused_parameters": lambda name, rank: data_parallel(name, rank, find_unused_parameters=True),
    "ddp static_graph": lambda name, rank: data_parallel(name, rank, static_graph=True),
    "ddp no_sync": accumulated,
    "step": stepped,
    "step in small buckets": lambda name, rank: stepped(name, rank, SMALL),
    "step in two parts": stepped_in_two_parts,
    "step, overlapped": overlapped,
    "step, fsdp2": stepped_fsdp2,
    "step in two parts, fsdp2": lambda name, rank: stepped_fsdp2(name, rank, parts=2),
    "step in two parts, fsdp2 reduces once": lambda name, rank: stepped_fsdp2(name, rank, parts=2, reduce_once=True),
    "fsdp2": fully_sharded,
}
FOUR = ["step in small buckets", "step in two parts"]  # of these with four processes, too
OPTIMIZERS = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def scenarios(world: int) -> dict[str, Callable[[int], Gradients]]:
    """The checks for a number of processes, by rank."""
    names = FOUR if world > 2 else SCENARIOS
    found = {f"{key} {name}": partial(SCENARIOS[key], name) for key in names for name in NETS}
    found |= {f"uneven {step}": partial(uneven, step) for step in range(len(UNEVEN))}
    if world > 2:
        return found | {"pairs vgg": partial(stepped_in_pairs, "vgg")}
    found |= {f"AdamW {key} vgg": partial(optimized, "vgg", **options) for key, options in OPTIMIZERS.items()}
    found |= {f"frozen {name}": partial(stepped_frozen, name) for name in NETS}
    return found | {
        "forgetful": forgetful,
        "refused transformer": partial(refused, "transformer"),
        "refused fsdp2 resnet": partial(refused_fsdp2, "resnet"),
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    results: dict[str, Gradients | str] = {}
    for name, run in scenarios(world).items():
        try:
            results[name] = run(rank)
        except Exception as error:  # reported by the test of this scenario
            results[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
