"""Reference implementation, and the oracle of every test: one `autograd.grad` per loss, masked and summed.

It shares only the plan and the functions on nested values with the engine. It costs one full backward pass per loss
and one more per window.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop.engine.pytree import map_tensors, tensors_in
from relaybackprop.plan import PRIMARY, Boundary, Plan

Losses = Callable[[dict[str, Any]], dict[str, Tensor]]


def reference_gradients(
    model: nn.Module, plan: Plan, heads: Mapping[str, nn.Module], losses: Losses, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Compute the relay gradient of every parameter from the definition.

        grad(theta) = sum over the losses l whose window contains theta of  weight_l * d loss_l / d theta

    A parameter is below a window if the tensors at the window's lower ends depend on it.

    Args:
        model: the plain model.
        plan: the windows of the model.
        heads: the head of each auxiliary loss, by name.
        losses: a function from the outputs by name of the loss ("primary" and the plan's names) to the scalar losses
            by the same names.
        *args: positional arguments of the model.
        **kwargs: keyword arguments of the model.

    Returns:
        The gradient of each parameter that requires one, by its name in a `Relay` (`"model.<parameter>"` or
        `"heads.<name>.<parameter>"`); zeros for parameters that no loss reaches.

    Example:
        ```python
        gradients = reference_gradients(model, plan, heads, lambda outputs: {
            name: cross_entropy(scores, labels) for name, scores in outputs.items()
        }, images)
        ```
    """
    outputs, boundary_tensors = _plain_forward(model, plan, heads, args, kwargs)
    trained = {f"model.{name}": p for name, p in model.named_parameters()}
    for head_name, head in heads.items():
        trained |= {f"heads.{head_name}.{name}": p for name, p in head.named_parameters()}
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for loss_name, loss in losses(outputs).items():
        window = plan.windows[loss_name]
        below = _depends_on([tensor for end in window.ends for tensor in boundary_tensors[end]], trained)
        for name, gradient in zip(trained, _grad([loss], trained), strict=True):
            if gradient is not None and name not in below:
                total[name] += plan.weights[loss_name] * gradient
    return total


def _plain_forward(
    model: nn.Module, plan: Plan, heads: Mapping[str, nn.Module], args: Any, kwargs: Any
) -> tuple[dict[str, Any], dict[Boundary, list[Tensor]]]:
    """Run an ordinary forward pass. Returns the outputs by loss, and the tensors at each boundary."""
    values: dict[Boundary, Any] = {}
    handles: list[Any] = []
    for boundary in plan.boundaries:
        module = model.get_submodule(boundary.module)
        if boundary.side == "input":
            handles.append(module.register_forward_pre_hook(_record_input(values, boundary), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_record_output(values, boundary)))
    try:
        outputs: dict[str, Any] = {PRIMARY: model(*args, **kwargs)}
    finally:
        for handle in handles:
            handle.remove()
    for name, window in plan.auxiliary.items():
        assert window.upper is not None
        outputs[name] = heads[name](map_tensors(Tensor.clone, values[window.upper]))  # a head may modify it in place
    return outputs, {boundary: tensors_in(value) for boundary, value in values.items()}


def _record_input(values: dict[Boundary, Any], boundary: Boundary) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        values[boundary] = map_tensors(Tensor.clone, (args, kwargs))  # the trunk may modify it in place

    return hook


def _record_output(values: dict[Boundary, Any], boundary: Boundary) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        values[boundary] = map_tensors(Tensor.clone, output)

    return hook


def _depends_on(tensors: list[Tensor], parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters on which these tensors depend."""
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        return set()
    gradients = _grad([tensor.sum() for tensor in tensors], parameters)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _grad(scalars: list[Tensor], parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(scalars, list(parameters.values()), retain_graph=True, allow_unused=True)
