"""Loading of pretrained weights from the same network for different classes, or from a similar network."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.models.file import read_tensors

NESTED = ("state_dict", "model", "model_state_dict")  # keys of the state dict in checkpoints
PREFIX = "module."  # added by DistributedDataParallel
NAMED = 5  # tensors per line of the report


def load_pretrained(model: nn.Module, path: Path) -> list[str]:
    """Load the tensors of a file that fit a model, in place. Other tensors of the model keep their values.

    Returns:
        A report of the tensors that were loaded and of those that do not fit, as lines of text.

    Raises:
        InputError: the file does not exist, is not a state dict, or has no weights that fit the model.
    """
    state, own = read_state(path), model.state_dict()
    fitting = {key: state[key] for key in own if key in state and state[key].shape == own[key].shape}
    weights = sum(own[name].numel() for name, _ in model.named_parameters() if name in fitting)
    if not weights:
        raise InputError(
            f"{path} has no weights that fit this network: it contains {few(list(state))}, expected {few(list(own))}"
        )
    model.load_state_dict(fitting, strict=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"{path.name}: {len(fitting)} of {len(own)} tensors fit, {weights / total:.1%} of the parameters"]
    differing = [f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in state.keys() - fitting]
    lacking, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    for what, keys in (("of a different shape", differing), ("not in the file", lacking), ("not used", unknown)):
        lines += [f"{path.name}: {what}: {few(keys, NAMED)}"] if keys else []
    return lines


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or, with `weights_only=True`, from a PyTorch file.

    Raises:
        InputError: the file does not exist, or is not a state dict.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a state dict that can be read with weights_only=True: {reason}") from None
    while isinstance(content, Mapping) and (inner := next((content[key] for key in NESTED if key in content), None)):
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in entries if isinstance(value, Tensor)}
    if not state:
        raise InputError(
            f"{path} has no state dict: expected tensors by name, at the top level or under {', '.join(NESTED)}"
        )
    return {str(key).removeprefix(PREFIX): value for key, value in state.items()}
