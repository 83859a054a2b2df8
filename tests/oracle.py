"""Comparisons with the reference. They raise errors and do not return results that could be ignored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop import Plan, Relay, RelayLoss
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.loss import RelayOutput
from relaybackprop.reference import reference_gradients

RELATIVE_ERROR = 1e-12  # float64; maximum norm of a difference over the norm of the reference


def losses_of(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a smooth scalar for each loss that weights every output differently."""
    losses: dict[str, Tensor] = {}
    for name, value in outputs.items():
        tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
        terms = [(t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).tanh().sum() for t in tensors]
        losses[name] = torch.stack(terms).sum()
    return losses


def by_loss(output: RelayOutput) -> dict[str, Any]:
    return {"primary": output.primary, **output.auxiliary}


def weighted_sum(losses: Mapping[str, Tensor], plan: Plan) -> Tensor:
    return torch.stack([plan.weights[name] * loss for name, loss in losses.items()]).sum()


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return `.grad` of each parameter, with zeros for None."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def relay_gradients(relay: Relay, *inputs: Any, seed: int = 7, **named: Any) -> dict[str, Tensor]:
    """Return the gradients of one ordinary forward and backward pass."""
    relay.zero_grad(set_to_none=True)
    seed_generators(seed)  # dropout masks as in `expected_gradients`
    output = relay(*inputs, **named)
    weighted_sum(losses_of(by_loss(output)), relay.plan).backward()
    return gradients_of(relay)


def smooth_loss(plan: Plan) -> RelayLoss:
    """Return `losses_of` as a criterion."""

    def of_one(output: Any, _target: Any) -> Tensor:
        return losses_of({"any": output})["any"]

    return RelayLoss(dict.fromkeys(plan.windows, of_one))


def seed_generators(seed: int) -> None:
    """Seed all generators. `torch.manual_seed` takes up to a millisecond until CUDA is initialised."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def step_gradients(relay: Relay, *inputs: Any, seed: int = 7, **named: Any) -> dict[str, Tensor]:
    """Return the gradients of one `forward_backward`."""
    seed_generators(seed)
    relay.zero_grad(set_to_none=True)
    relay.forward_backward(*inputs, target=None, loss=smooth_loss(relay.plan), **named)
    return gradients_of(relay)


def seed_each_module(relay: Relay) -> None:
    """Make randomness depend on the module only, since heads run earlier in a step than in an ordinary pass."""
    for number, module in enumerate(relay.modules()):

        def seed(_module: nn.Module, _args: Any, number: int = number) -> None:
            seed_generators(number)

        module.register_forward_pre_hook(seed)


def expected_gradients(
    relay: Relay, *inputs: Any, plan: Plan | None = None, seed: int = 7, **named: Any
) -> dict[str, Tensor]:
    seed_generators(seed)
    heads = dict(relay.heads.items())
    return reference_gradients(relay.model, plan or relay.plan, heads, losses_of, *inputs, **named)


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = RELATIVE_ERROR) -> None:
    """Check that each gradient is within `tolerance` of the expected one, relative to its norm.

    If zero is expected, the gradient must be zero. The norm is at least 1e-6 of the largest gradient's, so that sums
    that cancel to nearly zero are not compared at the precision of their rounding error.
    """
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    assert got, "nothing to compare"
    largest = max(float(tensor.norm()) for tensor in expected.values())
    assert largest > 0, "every expected gradient is zero: this comparison could not fail"
    for name, right in expected.items():
        if not right.any():
            assert not got[name].any(), f"{name}: expected no gradient, got {got[name].norm():.3e}"
            continue
        error = float((got[name] - right).norm() / max(float(right.norm()), 1e-6 * largest))
        assert error <= tolerance, f"{name}: relative error {error:.3e} above {tolerance:.0e}"
