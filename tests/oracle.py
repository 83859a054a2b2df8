"""Comparisons with the reference. They raise; none of them returns a verdict that could be dropped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop import Plan, Relay, RelayLoss
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.loss import RelayOutput
from relaybackprop.reference import reference_gradients

RELATIVE_ERROR = 1e-12  # float64; the largest norm of a difference over the norm of what is right


def losses_of(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """By loss, a smooth scalar that weighs every output differently."""
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
    """What is in `.grad`, by parameter; zeros where there is nothing."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def relay_gradients(relay: Relay, *inputs: Any, seed: int = 7, **named: Any) -> dict[str, Tensor]:
    """One ordinary forward and one ordinary backward."""
    relay.zero_grad(set_to_none=True)
    seed_generators(seed)  # dropout masks as in `expected_gradients`
    output = relay(*inputs, **named)
    weighted_sum(losses_of(by_loss(output)), relay.plan).backward()
    return gradients_of(relay)


def smooth_loss(plan: Plan) -> RelayLoss:
    """`losses_of` as a criterion."""

    def of_one(output: Any, _target: Any) -> Tensor:
        return losses_of({"any": output})["any"]

    return RelayLoss(dict.fromkeys(plan.windows, of_one))


def seed_generators(seed: int) -> None:
    """`torch.manual_seed`, which until CUDA is initialised takes up to a millisecond to format its stack."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def step_gradients(relay: Relay, *inputs: Any, seed: int = 7, **named: Any) -> dict[str, Tensor]:
    """Forward and backward in one."""
    seed_generators(seed)
    relay.zero_grad(set_to_none=True)
    relay.forward_backward(*inputs, target=None, loss=smooth_loss(relay.plan), **named)
    return gradients_of(relay)


def seed_each_module(relay: Relay) -> None:
    """Let chance depend on the module alone: heads run earlier in a step than in an ordinary forward pass."""
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
    """Raise unless each gradient is within `tolerance` of what is expected, relative to its norm.

    Where zero is expected, zero must come. The floor for the norm is 1e-6 of the largest gradient's, so that sums
    that cancel to nothing are not held to a relative error of their rounding.
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
