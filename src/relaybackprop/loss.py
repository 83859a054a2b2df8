"""The loss of a relay: the weighted sum of the primary and auxiliary losses."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from relaybackprop.engine.pytree import describe
from relaybackprop.errors import HeadError, PlanError
from relaybackprop.plan import PRIMARY

Criterion = Callable[[Any, Any], Tensor]


class RelayOutput(NamedTuple):
    """The output of `Relay` in training mode.

    Attributes:
        primary: the model's output.
        auxiliary: the heads' outputs by name, except heads on modules that LayerDrop skipped.
        weights: the factor of each loss by name; the primary loss is first.

    Example:
        ```python
        output = relay(images)
        accuracy = (output.primary.argmax(1) == labels).float().mean()
        ```
    """

    primary: Any
    auxiliary: dict[str, Any]
    weights: dict[str, float]

    if not TYPE_CHECKING:  # a type checker must still reject unknown attributes

        def __getattr__(self, name: str) -> NoReturn:
            """Raise the error for an unknown attribute, such as a method of the tensor that evaluation mode returns."""
            hint = (
                ""
                if name.startswith("_")
                else (
                    ". In training mode a relay returns the outputs of all losses: use output.primary for the model's "
                    "output, or call relay.eval() first"
                )
            )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    @property
    def losses(self) -> dict[str, Any]:
        """The input of each criterion by loss name; the primary loss is first."""
        return {PRIMARY: self.primary, **self.auxiliary}


class RelayLoss(nn.Module):
    """The weighted sum of the primary and auxiliary losses. The relay's output carries the plan's weights.

    Args:
        criterion: a function of an output and the target that returns a scalar, or a mapping with one such function
            for each loss, by name ("primary" and the plan's auxiliary names).

    Raises:
        PlanError: `criterion` is a class instead of an instance, or a second argument is given.

    Example:
        ```python
        criterion = RelayLoss(nn.CrossEntropyLoss())
        criterion(relay(images), labels).backward()
        ```
    """

    def __init__(self, criterion: Criterion | Mapping[str, Criterion], plan: Any = None) -> None:
        super().__init__()
        if plan is not None or not (callable(criterion) or hasattr(criterion, "items")):  # a plan: before 0.2
            raise PlanError(
                f"RelayLoss does not accept {types_of(criterion, *(() if plan is None else (plan,)))}",
                "its argument is one criterion, or a mapping from loss names to criteria; since 0.2 the relay's output "
                "carries the plan's weights",
                "Write RelayLoss(nn.CrossEntropyLoss()).",
            )
        self.criterion: nn.Module
        # Submodules, so that `to(device)` also moves class weights in a criterion.
        if isinstance(criterion, (Mapping, nn.ModuleDict)):
            criteria = dict(cast(Mapping[str, Criterion], criterion).items())
            self.criterion = nn.ModuleDict({name: _as_module(function) for name, function in criteria.items()})
        else:
            self.criterion = _as_module(criterion)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the weighted sum, a scalar. For a plain output, as in evaluation mode, return the primary loss.

        Args:
            output: the output of `Relay`, in training or evaluation mode.
            target: passed to each criterion unchanged.

        Raises:
            HeadError: the names of the criteria and of the losses differ, a head's output does not fit the target, or
                one criterion is given and a head's output does not have the shape of the model's output.
        """
        weights = output.weights if isinstance(output, RelayOutput) else {PRIMARY: 1.0}
        weighted = [weights[name] * term for name, term in self.terms(output, target).items()]
        return sum(weighted[1:], start=weighted[0])

    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Return the unweighted losses by name. It has the same arguments and errors as `forward`.

        Example:
            ```python
            terms = criterion.terms(relay(images), labels)
            print({name: term.item() for name, term in terms.items()})
            ```
        """
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
                        f"The primary loss read {describe(output)}: select an item, Relay(..., output='logits')."
                    )
                raise
        try:
            return criterion(output, target)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (ValueError, IndexError, RuntimeError) as error:
            raise HeadError(
                f"the criterion of {name!r} rejects the head's output {shape_of(output)} with the target "
                f"{shape_of(target)} ({error})",
                "the head's output must fit the target",
                "Give the head as many classes as the target has, or give each loss its own criterion.",
            ) from error

    def check_names(self, losses: Mapping[str, Any]) -> None:
        """Check that there is one criterion for all losses, or exactly one for each.

        Raises:
            HeadError: the names of the criteria and of the losses differ.
        """
        if isinstance(self.criterion, nn.ModuleDict) and set(self.criterion) != set(losses):
            raise HeadError(
                f"there are criteria for {list(self.criterion)}",
                f"the losses are {list(losses)}, and each requires one criterion",
                "Add the missing criteria and remove the others, or pass a single criterion for all losses.",
            )

    def check_fits(self, output: RelayOutput) -> None:
        """Check the criteria's names, and that all outputs have equal shapes if one criterion serves all losses.

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
        raise PlanError(
            f"the criterion is {types_of(criterion)}",
            "it must be an instance or a function",
            f"Call the class: {criterion.__name__}().",
        )
    return criterion if isinstance(criterion, nn.Module) else _Function(criterion)


def _check_same_shape(name: str, scores: Any, primary: Any) -> None:
    if isinstance(scores, Tensor) and isinstance(primary, Tensor) and scores.shape != primary.shape:
        raise HeadError(
            f"the head {name!r} returns the shape {shape_of(scores)}",
            f"it must return the shape of the model's output, {shape_of(primary)}, since one criterion compares both "
            "with the target",
            "Give the head as many classes as the model has, or give each loss its own criterion.",
        )


def types_of(*values: Any) -> str:
    """Name the types of arguments for an error message."""
    return " and ".join(f"the class {v.__name__}" if isinstance(v, type) else f"a {type(v).__name__}" for v in values)


def shape_of(value: Any) -> str:
    """Return the shape of a tensor, or the type of any other value, for an error message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
