"""External networks by name: timm, torchvision, and functions in a package or a file.

Note [Code that the user names]
Importing a function runs the code of its module, so it is imported only if the user has named it, on the command line
or in a recipe file given there. `allow` records the name in a file of the cache folder, so that the resulting runs and
model files can be used by path alone. A run or model file from elsewhere is rejected until the user passes its network
by name. timm and torchvision accept only their own names, and no options that make them download or unpickle weights.
"""

import importlib
import importlib.util
import inspect
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from relaylab.data.sources.cache import atomic_cache_write, cache_folder
from relaylab.errors import InputError, nearest
from relaylab.outside.folders import is_our_own
from relaylab.outside.reading import LARGEST, read_bytes
from relaylab.recipes.schema import NetworkConfig

Builder = Callable[..., Any]
ALLOWED = "named-networks.txt"  # in the cache folder, one name per line
WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


def allow(network: NetworkConfig) -> None:
    """Record that the user has named a network. See Note [Code that the user names]."""
    name, names = network.architecture, _allowed()
    if network.is_code and name not in names:
        with atomic_cache_write(cache_folder() / ALLOWED) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in [*names, name]), encoding="utf-8")


def _allowed() -> list[str]:
    path = cache_folder() / ALLOWED
    try:
        return read_bytes(path, LARGEST).decode(errors="replace").splitlines() if is_our_own(path) else []
    except OSError:
        return []


def build_named(config: NetworkConfig) -> nn.Module:
    """Build an external network with random weights, by calling it with num_classes and the options.

    Raises:
        InputError: the name is unknown, the code cannot be imported or has not been named by the user, an option is not
            accepted, or the result is not a module.
    """
    name, options = config.architecture, dict(config.options)
    weights = [option for option in options if option in WEIGHTS]
    if weights:
        raise InputError(
            f"network.options.{weights[0]} is not allowed: to start from trained weights, set network.pretrained=FILE"
        )
    build = find_builder(name)
    try:
        model = build(num_classes=config.num_classes, **options)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # third-party code can raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": config.num_classes, **options}.items())
        what = f"{type(error).__name__}: {error}{'' if name.partition(':')[0] in FINDERS else _place(error)}"
        raise InputError(f"{name} with {given}: {what}{_arguments(build, options)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}: expected a torch.nn.Module")
    return model


def find_builder(name: str) -> Builder:
    """Import and return the function of a named architecture.

    Raises:
        InputError: the name is unknown, or the code cannot be imported or has not been named by the user.
    """
    place, _, inside = name.partition(":")
    if place in FINDERS:
        return FINDERS[place](inside)
    if name not in _allowed():
        raise InputError(
            f"{name} is code that has not been allowed on this machine, and importing it would run it; if you trust "
            f"it, run: relaylab recipes allow {shlex.quote(name)}"
        )
    return _function(name)


@cache
def _function(name: str) -> Builder:
    place, _, inside = name.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _imported(place, place)
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if inside not in functions:
        defined = [key for key, value in functions.items() if getattr(value, "__module__", None) == module.__name__]
        raise InputError(f"{place} has no function {inside!r}{nearest(inside, defined)}")
    return functions[inside]


def _imported(module: str, place: str) -> ModuleType:
    """Import a module; raise InputError for any exception in its code."""
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        remedy = f"; install {missing.partition('.')[0]}, or pass a file: path/to/file.py:function" if missing else ""
        raise InputError(f"cannot import {place}: {type(error).__name__}: {error}{remedy}") from error


def _file(path: Path) -> ModuleType:
    """Import a file under a unique module name, with its folder on `sys.path`, so that it can import its neighbours."""
    if not path.is_file():
        raise InputError(f"no such file: {path}; a network is named as path/to/file.py:function")
    module_name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None, "a .py file has a loader"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # such as a script that parses its arguments
            del sys.modules[module_name]
            raise InputError(f"cannot import {path}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[module_name]


def _timm(name: str) -> Builder:
    timm = _imported("timm", f"timm:{name}")
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    return partial(timm.create_model, name)


def _torchvision(name: str) -> Builder:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise InputError(f"torchvision has no classifier {name!r}{nearest(name, names)}")
    return partial(models.get_model, name, weights=None)


FINDERS: dict[str, Callable[[str], Builder]] = {"timm": _timm, "torchvision": _torchvision}


def _place(error: BaseException) -> str:
    """Return the line of a network's code that raised an error; empty if the call itself raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _arguments(build: Builder, options: dict[str, Any]) -> str:
    """Return the suffix of an error message that suggests arguments similar to an unknown option."""
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return ""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ""
    if "num_classes" not in parameters:
        return "; expected a function of num_classes"
    unknown = next((option for option in options if option not in parameters), None)
    return nearest(unknown, [name for name in parameters if name != "num_classes"]) if unknown else ""
