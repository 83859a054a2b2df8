"""Weights to start from, of the same network for other classes, or of one much like it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.models.file import read_tensors

NESTED = ("state_dict", "model", "model_state_dict")  # keys of checkpoints that hold the state dict
PREFIX = "module."  # of DistributedDataParallel
NAMED = 5  # tensors that a line names, at most


def load_pretrained(model: nn.Module, path: Path) -> list[str]:
    """Load those tensors of a file that fit a model, in place; the others of the model keep their values.

    Returns:
        What was loaded, and what does not fit, in sentences.

    Raises:
        InputError: no such file, a file of another kind, or one of another network: of its layers nothing fits.
    """
    state, own = read_state(path), model.state_dict()
    fitting = {key: state[key] for key in own if key in state and state[key].shape == own[key].shape}
    weights = sum(own[name].numel() for name, _ in model.named_parameters() if name in fitting)
    if not weights:
        raise InputError(
            f"{path} holds no weights of this network: it has {few(list(state))}, expected {few(list(own))}"
        )
    model.load_state_dict(fitting, strict=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"{path.name}: {len(fitting)} of {len(own)} tensors fit, {weights / total:.1%} of the parameters"]
    differing = [f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in state.keys() - fitting]
    lacking, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    for what, keys in (("of another shape", differing), ("not in the file", lacking), ("not used", unknown)):
        lines += [f"{path.name}: {what}: {few(keys, NAMED)}"] if keys else []
    return lines


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from PyTorch's own format, of which nothing but tensors is unpickled.

    Raises:
        InputError: no such file, or one of another kind.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a state dict that can be read with weights_only=True: {reason}") from None
    while isinstance(found, Mapping) and (inner := next((found[key] for key in NESTED if key in found), None)):
        found = inner
    state = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, Mapping) else {}
    )
    if not state:
        raise InputError(f"{path} holds no state dict: expected tensors by name, perhaps under {', '.join(NESTED)}")
    return {str(key).removeprefix(PREFIX): value for key, value in state.items()}
