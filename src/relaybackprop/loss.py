"""The loss of a relay: the weighted sum of the primary and auxiliary losses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from relaybackprop.engine.pytree import describe
from relaybackprop.errors import HeadError, PlanError
from relaybackprop.plan import PRIMARY

Criterion = Callable[[Any, Any], Tensor]


class RelayOutput(NamedTuple):
    """The output of `Relay` in training mode.

    Attributes:
        primary: the model's own output.
        auxiliary: the heads' outputs by name, except heads whose modules layer drop has skipped.
        weights: the factor of each loss by name, the primary one first.
    """

    primary: Any
    auxiliary: dict[str, Any]
    weights: dict[str, float]

    @property
    def losses(self) -> dict[str, Any]:
        """The input of each criterion by loss name, the primary one first."""
        return {PRIMARY: self.primary, **self.auxiliary}


class RelayLoss(nn.Module):
    """The weighted sum of the primary and auxiliary losses. The weights are in the relay's output.

    Args:
        criterion: a function of an output and the target that returns a scalar; or one such function for each loss, by
            name (`"primary"` and the plan's auxiliary names).

    Raises:
        PlanError: `criterion` is a class instead of an instance, or there is a second argument.

    Example:
        >>> criterion = RelayLoss(nn.CrossEntropyLoss())
        >>> criterion(relay(images), labels).backward()  # doctest: +SKIP
    """

    def __init__(self, criterion: Criterion | Mapping[str, Criterion], plan: Any = None) -> None:
        super().__init__()
        if plan is not None or not (callable(criterion) or hasattr(criterion, "items")):  # a plan: before 0.2
            raise PlanError(
                "a criterion, or a mapping from loss names to criteria, and no plan",
                kinds_of(criterion, *(() if plan is None else (plan,))),
                "Write RelayLoss(nn.CrossEntropyLoss()): since 0.2 the relay's output carries the plan's weights.",
            )
        self.criterion: nn.Module
        # Submodules, so that `to(device)` also moves class weights in a criterion.
        if isinstance(criterion, (Mapping, nn.ModuleDict)):
            criteria = dict(cast(Mapping[str, Criterion], criterion).items())
            self.criterion = nn.ModuleDict({name: _as_module(each) for name, each in criteria.items()})
        else:
            self.criterion = _as_module(criterion)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the weighted sum, a scalar. For a plain output, as in evaluation mode, it is the primary loss.

        Args:
            output: the output of `Relay`, in training or evaluation mode.
            target: passed to each criterion unchanged.

        Raises:
            HeadError: the criteria's names are not those of the losses, or a head's output does not fit the target, or
                has another shape than the model's output although one criterion serves both.
        """
        factors = output.weights if isinstance(output, RelayOutput) else {PRIMARY: 1.0}
        weighted = [factors[name] * term for name, term in self.terms(output, target).items()]
        return sum(weighted[1:], start=weighted[0])

    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Return the unweighted losses by name. Takes the arguments of `forward` and raises the same errors."""
        if not isinstance(output, RelayOutput):
            return {PRIMARY: self.term(PRIMARY, output, target)}
        self.check_fits(output)
        return {name: self.term(name, value, target) for name, value in output.losses.items()}

    def term(self, name: str, output: Any, target: Any) -> Tensor:
        """Return one unweighted loss.

        Args:
            name: the name of the loss.
            output: the output of the model or the head.
            target: passed to the criterion unchanged.

        Raises:
            HeadError: a head's output does not fit the target.
        """
        criterion = self.criterion[name] if isinstance(self.criterion, nn.ModuleDict) else self.criterion
        if name == PRIMARY:
            try:
                return criterion(output, target)
            except TypeError as error:
                if not isinstance(output, Tensor):
                    error.add_note(
                        f"The primary loss read {describe(output)}: name an item, Relay(..., output='logits')."
                    )
                raise
        try:
            return criterion(output, target)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (ValueError, IndexError, RuntimeError) as error:
            raise HeadError(
                f"the head {name!r} to return what its criterion accepts with this target ({shape_of(target)})",
                f"{shape_of(output)}, for which the criterion raised: {error}",
                "Give the head as many classes as the target has, or give each loss its own criterion.",
            ) from error

    def check_names(self, losses: Mapping[str, Any]) -> None:
        """Check that there is exactly one criterion for each loss.

        Raises:
            HeadError: the names differ.
        """
        if isinstance(self.criterion, nn.ModuleDict) and set(self.criterion) != set(losses):
            raise HeadError(
                f"one criterion for each of {list(losses)}",
                f"criteria for {list(self.criterion)}",
                "Add the missing ones and remove the others, or give a single criterion for all.",
            )

    def check_fits(self, output: RelayOutput) -> None:
        """Check the criteria's names and, where one criterion serves all losses, that outputs have equal shapes.

        Raises:
            HeadError: names or shapes differ.
        """
        self.check_names(output.weights)
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
    if isinstance(criterion, type):
        raise PlanError("an instance or a function as a criterion", kinds_of(criterion), "Call the class.")
    return criterion if isinstance(criterion, nn.Module) else _Function(criterion)


def _check_same_shape(name: str, scores: Any, primary: Any) -> None:
    if isinstance(scores, Tensor) and isinstance(primary, Tensor) and scores.shape != primary.shape:
        raise HeadError(
            f"the head {name!r} to have an output of the shape of the model's, {shape_of(primary)}, "
            "since one criterion compares both with the target",
            shape_of(scores),
            "Give the head as many classes as the model has, or give each loss its own criterion.",
        )


def kinds_of(*values: Any) -> str:
    """Describe the types of arguments for an error message."""
    return " and ".join(f"the class {v.__name__}" if isinstance(v, type) else f"a {type(v).__name__}" for v in values)


def shape_of(value: Any) -> str:
    """Return the shape of a tensor, or the type of any other value, for an error message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
