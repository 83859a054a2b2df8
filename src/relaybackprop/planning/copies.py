"""Runs of a model on copies: meta copies if possible, otherwise copies with values.

Note [Values]
1. Meta copies have shapes but no values. They take no memory and little time, so they are tried first.
2. Some forward passes depend on values: `item()`, `if mask.all():`, a graph's number of nodes. They run on real copies
   with the example's values, on the device of each tensor, which takes the memory and the time of a real pass.
3. Both count the same operations and the same saved bytes. Attention is fused on the meta device as on a CPU. oneDNN is
   disabled on real values, since its fused recurrent layers hide their matrix products.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaybackprop.engine.pytree import map_tensors, tensors_in
from relaybackprop.errors import PlanError, RelayError

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


def run_on_copies(modules: Sequence[nn.Module], example_input: Any, run: Callable[[list[Any], Arguments], T]) -> T:
    """Run a function on copies of modules and of an example (Note [Values]).

    Args:
        modules: the modules to copy. Copies are in training mode, and share the tensors that the modules share.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        run: a function of the copies and the arguments. If it fails on meta copies, it is called again with values.

    Returns:
        The result of `run`.

    Raises:
        PlanError: `run` raises an exception other than `RelayError`, on meta copies and on copies with values (if the
            arguments have values).
        RelayError: an error raised by `run`.
    """
    try:
        return _run_on_copies(modules, example_input, run)
    except PlanError as error:
        if isinstance(error.__cause__, Exception) and _is_shape(example_input):
            raise _shape_error(example_input) from error
        raise


def _run_on_copies(modules: Sequence[nn.Module], example_input: Any, run: Callable[[list[Any], Arguments], T]) -> T:
    try:
        with dry_run():
            return run(_copies(modules, _without_values), _arguments(example_input, _without_values))
    except PlanError:
        state = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if any(tensor.is_meta for tensor in (*tensors_in(example_input), *state)):
            raise
    gpus = {tensor.device.index for tensor in state if tensor.device.type == "cuda"}
    context = "training mode on the example, on the meta device or on its values"
    with _recording(context, gpus), _without_onednn():
        return run(_copies(modules, _with_values), _arguments(example_input, _with_values))


def _is_shape(value: Any) -> bool:
    """Return whether a value looks like the shape of a tensor."""
    if not isinstance(value, (tuple, list)):
        return False
    items = cast(Sequence[Any], value)
    return len(items) > 0 and all(type(item) is int for item in items)


def _shape_error(shape: Sequence[int]) -> PlanError:
    """Build the error for a shape in place of an example, which would be passed as one argument per dimension."""
    batch = shape if len(shape) not in (1, 3) else (2, *shape)  # one example, such as (C, H, W)
    return PlanError(
        f"the example input is {tuple(shape)}, a shape",
        "it must be a batch: a tensor, a tuple of arguments, or a dict of keyword arguments",
        f"Pass torch.empty({', '.join(map(str, batch))}).",
    )


@contextmanager
def dry_run() -> Generator[None]:
    """Run models on the meta device, with gradients recorded and random number generators preserved.

    Raises:
        PlanError: the code inside raises an exception other than `RelayError`.
    """
    context = "training mode on the meta device, on tensors that have shapes but no values"
    with _recording(context), torch.device("meta"), _fused_attention():
        yield


@contextmanager
def _recording(context: str, gpus: Sequence[int] | set[int] = ()) -> Generator[None]:
    """Record gradients, preserve random number generators, and convert exceptions to a `PlanError`."""
    try:
        with (
            torch.random.fork_rng(devices=list(gpus)),  # pyright: ignore[reportUnknownMemberType]
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    except RelayError:
        raise
    except Exception as error:
        raise PlanError(
            f"the model raised {type(error).__name__} ({' '.join([str(error), *getattr(error, '__notes__', ())])})",
            f"it must run in {context}",
            "Give an example input that fits the model. If the forward pass depends on values (item(), if tensor:), "
            "keep the model and the example off the meta device, or write the plan by hand; reach() works with any "
            "model.",
        ) from error


def _copies(modules: Sequence[nn.Module], copy_of: Callable[[Tensor], Tensor]) -> list[nn.Module]:
    memo: dict[int, Any] = {}
    for module in modules:
        for submodule in module.modules():
            # Plain tensor attributes too, not only parameters and buffers: they must be on the same device.
            memo |= {id(tensor): copy_of(tensor) for tensor in tensors_in(vars(submodule)) if id(tensor) not in memo}
    return [copy.deepcopy(module, memo).train() for module in modules]


def _arguments(value: Any, copy_of: Callable[[Tensor], Tensor]) -> Arguments:
    """Copy an example and return it as positional and keyword arguments."""
    value = map_tensors(copy_of, value)
    if isinstance(value, Mapping):
        return (), dict(cast(Mapping[str, Any], value))
    return (cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)), {}


def _without_values(tensor: Tensor) -> Tensor:
    return _like(tensor, torch.empty_like(tensor, device="meta", requires_grad=False))


def _with_values(tensor: Tensor) -> Tensor:
    return _like(tensor, tensor.detach().clone())


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


@contextmanager
def _without_onednn() -> Generator[None]:
    """Disable oneDNN (Note [Values] 3). `torch.backends.mkldnn.flags` would warn about missing GPUs."""
    was_enabled = torch._C._get_mkldnn_enabled()  # pyright: ignore
    torch._C._set_mkldnn_enabled(False)  # pyright: ignore
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)  # pyright: ignore


@contextmanager
def _fused_attention() -> Generator[None]:
    """Fuse attention on the meta device (Note [Values] 3), as PyTorch does on every other device."""
    attention = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        # Fuse the cases that the CPU kernel supports.
        is_plain = query.ndim == 4 and dropout_p == 0 and not any(options.values())
        is_fixed = attn_mask is None or (attn_mask.ndim in (2, 4) and not attn_mask.requires_grad)
        if query.device.type != "meta" or not is_plain or not is_fixed:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
