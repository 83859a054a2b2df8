"""Find and replace tensors in the nested values that modules take and return."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor

from relaybackprop.errors import HeadError


def tensors_in(value: Any) -> list[Tensor]:
    """The distinct tensors in nested tuples, lists, mappings and dataclasses, in a fixed order."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor)

    map_tensors(note, value)
    return list(found.values())


def replace_tensors(value: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """The same structure with each tensor of `old` replaced by its counterpart in `new`."""
    replacement = {id(before): after for before, after in zip(old, new, strict=True)}
    return map_tensors(lambda tensor: replacement.get(id(tensor), tensor), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor of a nested structure and rebuild the structure from the results.

    Containers keep their type: named tuples, subclasses of dict, and dataclasses such as the output classes of
    transformers. Other objects are returned unchanged.
    """
    if isinstance(value, Tensor):
        return function(value)
    kind: Any = cast(Any, type(value))
    if isinstance(value, MutableMapping):
        changed = copy.copy(cast(MutableMapping[Any, Any], value))
        for key, item in changed.items():
            changed[key] = map_tensors(function, item)
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in cast(Sequence[Any], value)]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for entry in dataclasses.fields(value):
            item = getattr(value, entry.name)
            object.__setattr__(changed, entry.name, map_tensors(function, item))  # frozen ones too
        return changed
    return value


def items_of(value: Any) -> dict[Any, Any]:
    """Items of a tuple, list, mapping or dataclass by index or name; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(cast(Mapping[Any, Any], value))
    names = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())  # of a named tuple first
    if not names and isinstance(value, (tuple, list)):
        return dict(enumerate(cast(list[Any], value)))
    return {name: getattr(value, name) for name in names}


def item_of(value: Any, key: Any) -> Any:
    """One item by name or index; raises `HeadError` if the value does not have it."""
    items = items_of(value)
    if isinstance(key, int) and key not in items and -len(items) <= key < len(items):
        return [*items.values()][key]
    if key not in items:
        raise HeadError(
            f"a value with an item {key!r}",
            f"{describe(value)}",
            f"Name one of its items, {list(items)}." if items else "Use the value itself, without Select.",
        )
    return items[key]


def describe(value: Any) -> str:
    """A value in words: the shape of a tensor, the items of a container."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    keys = list(items_of(value))
    return f"a {type(value).__name__}" + (f" with items {keys}" if keys else "")


def paths_in(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors of a nested value, each with its keys."""
    if isinstance(value, Tensor):
        yield keys, value
    for key, item in items_of(value).items():
        yield from paths_in(item, (*keys, key))
