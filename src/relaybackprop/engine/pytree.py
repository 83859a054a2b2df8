"""Find and replace tensors in the nested values that modules accept and return."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor

from relaybackprop.errors import HeadError


def tensors_in(value: Any) -> list[Tensor]:
    """Return the distinct tensors in nested tuples, lists, mappings and dataclasses, in a fixed order."""
    tensors: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor:
        return tensors.setdefault(id(tensor), tensor)

    map_tensors(collect, value)
    return list(tensors.values())


def replace_tensors(value: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """Return the same structure with each tensor of `old` replaced by its counterpart in `new`."""
    replacement = {id(before): after for before, after in zip(old, new, strict=True)}
    return map_tensors(lambda tensor: replacement.get(id(tensor), tensor), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor of a nested structure and rebuild the structure from the results.

    Containers keep their type, including named tuples, subclasses of dict, and dataclasses such as the output classes
    of transformers. Other objects are returned unchanged.
    """
    if isinstance(value, Tensor):
        return function(value)
    cls: Any = cast(Any, type(value))
    if isinstance(value, MutableMapping):
        result = copy.copy(cast(MutableMapping[Any, Any], value))
        for key, item in result.items():
            result[key] = map_tensors(function, item)
        return result
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in cast(Sequence[Any], value)]
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field_ in dataclasses.fields(value):
            item = getattr(value, field_.name)
            object.__setattr__(result, field_.name, map_tensors(function, item))  # frozen ones too
        return result
    return value


def items_of(value: Any) -> dict[Any, Any]:
    """Return the items of a tuple, list, mapping or dataclass by index or name; empty for any other value."""
    if isinstance(value, Mapping):
        return dict(cast(Mapping[Any, Any], value))
    names = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())  # named tuple, or dataclass
    if not names and isinstance(value, (tuple, list)):
        return dict(enumerate(cast(list[Any], value)))
    return {name: getattr(value, name) for name in names}


def item_of(value: Any, key: Any) -> Any:
    """Return one item by name or index. Raises `HeadError` if the value does not have it."""
    items = items_of(value)
    if isinstance(key, int) and key not in items and -len(items) <= key < len(items):
        return [*items.values()][key]
    if key not in items:
        raise HeadError(
            f"{describe(value)} does not have the item {key!r}",
            f"its items are {list(items)}" if items else "it is not a container",
            "Choose one of its items." if items else "Use the value itself, without Select.",
        )
    return items[key]


def describe(value: Any) -> str:
    """Describe a value for an error message: the shape of a tensor, or the items of a container."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    keys = list(items_of(value))
    return f"a {type(value).__name__}" + (f" with items {keys}" if keys else "")


def paths_in(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield all tensors of a nested value, each with its keys."""
    if isinstance(value, Tensor):
        yield keys, value
    for key, item in items_of(value).items():
        yield from paths_in(item, (*keys, key))
