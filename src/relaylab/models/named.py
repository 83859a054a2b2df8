"""Networks of other code, by name: timm's, torchvision's, and functions of a package or of a file.

Note [Code that the user names]
A function is imported, and with it all of its module runs, only if the user has named it: on the command line, or in a
recipe file that is on the command line. `allow` notes that, in a file of the cache folder, so that the runs and model
files that follow can be used by their own paths. One that comes from elsewhere is refused until the user names its
network. timm and torchvision take names of their own only, and no option that makes them download or unpickle weights.
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
ALLOWED = "named-networks.txt"  # in the cache folder, a name on each line
WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


def allow(network: NetworkConfig) -> None:
    """Note that the user has named a network. See Note [Code that the user names]."""
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
    """Build a network of other code with fresh weights, from num_classes and the options.

    Raises:
        InputError: an unknown name, code that cannot be imported or that the user has not named, options that it does
            not take, or a result that is not a module.
    """
    name, options = config.architecture, dict(config.options)
    weights = [option for option in options if option in WEIGHTS]
    if weights:
        raise InputError(
            f"network.options.{weights[0]}: networks start with fresh weights; give network.pretrained=FILE"
        )
    build = find_builder(name)
    try:
        model = build(num_classes=config.num_classes, **options)
    except InputError:
        raise
    except Exception as error:  # of code that the lab does not know
        given = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": config.num_classes, **options}.items())
        what = f"{type(error).__name__}: {error}{'' if name.partition(':')[0] in FINDERS else _place(error)}"
        raise InputError(f"{name} with {given}: {what}{_arguments(build, options)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}: expected a torch.nn.Module")
    return model


def find_builder(name: str) -> Builder:
    """Find the function that a named architecture stands for, and import its code.

    Raises:
        InputError: an unknown name, code that cannot be imported, or that the user has not named.
    """
    place, _, inside = name.partition(":")
    if place in FINDERS:
        return FINDERS[place](inside)
    if name not in _allowed():
        raise InputError(
            f"{name} is code that you have not named on this machine, and importing it would run it; if you trust it: "
            f"relaylab recipes allow {shlex.quote(name)}"
        )
    return _function(name)


@cache
def _function(name: str) -> Builder:
    place, _, inside = name.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _imported(place, place)
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if inside not in functions:
        own = [key for key, value in functions.items() if getattr(value, "__module__", None) == module.__name__]
        raise InputError(f"{place} has no function {inside!r}{nearest(inside, own)}")
    return functions[inside]


def _imported(module: str, place: str) -> ModuleType:
    """Import a module; whatever its code raises is an error of its place."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        remedy = f"; install {missing.partition('.')[0]}, or name a file: path/to/file.py:function" if missing else ""
        raise InputError(f"cannot import {place}: {type(error).__name__}: {error}{remedy}") from error


def _file(path: Path) -> ModuleType:
    """Import a file under a name of its own, with its folder on the path, for the files beside it."""
    if not path.is_file():
        raise InputError(f"no such file: {path}; networks are named as path/to/file.py:function")
    module_name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None, "a file that ends in .py has a loader"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
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


def _place(error: Exception) -> str:
    """Return the line that raised an error of a network's code; empty for the call of the function itself."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _arguments(build: Builder, options: dict[str, Any]) -> str:
    """Return the nearest arguments for an option that a builder does not have, as the end of an error message."""
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
