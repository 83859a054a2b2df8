"""WHAT is minimised: the weighted sum of a plan's losses, and what they are computed from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from relaybackprop.errors import HeadError, PlanError
from relaybackprop.plan import PRIMARY, Plan

Criterion = Callable[[Any, Any], Tensor]


class RelayOutput(NamedTuple):
    """What `Relay` returns in training mode.

    Attributes:
        primary: the model's own output.
        auxiliary: by name, the heads' outputs.
    """

    primary: Any
    auxiliary: dict[str, Any]


class RelayLoss(nn.Module):
    """The weighted sum of all losses of a plan.

    Args:
        criterion: one for all losses, or by name one for each (`"primary"` and the plan's auxiliary names). It is
            called with an output and the target and returns a scalar.
        plan: whose weights are used.

    Raises:
        PlanError: arguments of other types, or in another order.
        HeadError: criteria whose names are not those of the plan's losses.
    """

    def __init__(self, criterion: Criterion | Mapping[str, Criterion], plan: Plan) -> None:
        super().__init__()
        if not isinstance(plan, Plan) or isinstance(criterion, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                "a criterion (an instance or a function) and a plan, in this order",
                kinds_of(criterion, plan),
                "Write RelayLoss(nn.CrossEntropyLoss(), plan).",
            )
        self.plan = plan
        self.criterion: nn.Module
        # Modules, so that class weights in a criterion move to the device with this one.
        if isinstance(criterion, (Mapping, nn.ModuleDict)):
            criteria = dict(cast(Mapping[str, Criterion], criterion).items())
            if set(criteria) != set(plan.windows):
                raise HeadError(
                    f"one criterion for each of {list(plan.windows)}",
                    f"criteria for {list(criteria)}",
                    "Add the missing ones and remove the others, or give a single criterion for all.",
                )
            self.criterion = nn.ModuleDict({name: _as_module(each) for name, each in criteria.items()})
        else:
            self.criterion = _as_module(criterion)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The weighted sum, a scalar. A plain output, as in evaluation mode, has the primary loss only.

        Args:
            output: what `Relay` returned, in training or evaluation mode.
            target: handed to each criterion as it is.

        Raises:
            HeadError: a head's output does not fit the target, or differs in shape from the model's output where one
                criterion serves both.
        """
        weighted = [self.plan.weights[name] * term for name, term in self.terms(output, target).items()]
        return sum(weighted[1:], start=weighted[0])

    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        """The losses by name, not yet weighted. Same arguments and errors as `forward`."""
        if not isinstance(output, RelayOutput):
            return {PRIMARY: self.term(PRIMARY, output, target)}
        self.check_fits(output)
        outputs = {PRIMARY: output.primary, **output.auxiliary}
        return {name: self.term(name, value, target) for name, value in outputs.items()}

    def term(self, name: str, output: Any, target: Any) -> Tensor:
        """One loss, not yet weighted.

        Args:
            name: of the loss.
            output: the model's, or the head's.
            target: handed to the criterion as it is.

        Raises:
            HeadError: a head's output does not fit the target.
        """
        criterion = self.criterion[name] if isinstance(self.criterion, nn.ModuleDict) else self.criterion
        if name == PRIMARY:
            return criterion(output, target)
        try:
            return criterion(output, target)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (ValueError, IndexError, RuntimeError) as error:
            raise HeadError(
                f"the head {name!r} to give what its criterion takes with this target ({shape_of(target)})",
                f"{shape_of(output)}, for which the criterion said: {error}",
                "Give the head as many classes as the target has, or give each loss a criterion of its own.",
            ) from error

    def check_fits(self, output: RelayOutput) -> None:
        """Raise unless the outputs are those of this plan's losses, alike in shape where one criterion serves all.

        Raises:
            HeadError: they are not.
        """
        if set(output.auxiliary) != set(self.plan.auxiliary):
            raise HeadError(
                f"the outputs of the plan's heads, {list(self.plan.auxiliary)}",
                f"those of {list(output.auxiliary)}",
                "Build Relay and RelayLoss with the same plan.",
            )
        if not isinstance(self.criterion, nn.ModuleDict):
            for name, scores in output.auxiliary.items():
                _check_same_shape(name, scores, output.primary)


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Criterion) -> None:
        super().__init__()
        self.function = function

    def forward(self, output: Any, target: Any) -> Tensor:
        return self.function(output, target)


def _as_module(criterion: Criterion) -> nn.Module:
    return criterion if isinstance(criterion, nn.Module) else _Function(criterion)


def _check_same_shape(name: str, scores: Any, primary: Any) -> None:
    if isinstance(scores, Tensor) and isinstance(primary, Tensor) and scores.shape != primary.shape:
        raise HeadError(
            f"the head {name!r} to give the shape of the model's output, {shape_of(primary)}, "
            "since one criterion compares both with the target",
            shape_of(scores),
            "Give the head as many classes as the model has, or give each loss a criterion of its own.",
        )


def kinds_of(*values: Any) -> str:
    """What was given, in words."""
    return " and ".join(f"the class {v.__name__}" if isinstance(v, type) else f"a {type(v).__name__}" for v in values)


def shape_of(value: Any) -> str:
    """Of a tensor; of anything else its type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
