"""Batch normalisation over parts of one image: refused where a channel has a single value, else a warning."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from relaylab.errors import InputError
from relaylab.models.building import build_relay
from relaylab.recipes.schema import Recipe

REMEDY = "take a smaller --accumulate, fewer devices or a larger optimizer.batch_size"
TOO_FEW = "Expected more than 1 value per channel"  # of PyTorch's error


def single_image_problem(recipe: Recipe) -> str | None:
    """Return an error message if a recipe's network cannot normalise a batch of one image; nothing is computed.

    In a batch of two images or more, each channel has at least two values.
    """
    size = recipe.network.image_size
    last = ""
    try:
        relay = build_relay(recipe, on_meta=True).train()
    except InputError:
        return None  # other checks say what is wrong with the recipe

    def entered(module: nn.Module, _inputs: object) -> None:
        nonlocal last
        last = names[module]

    names = {module: name for name, module in relay.named_modules()}
    hooks = [module.register_forward_pre_hook(entered) for module in names if isinstance(module, _BatchNorm)]
    try:
        relay(torch.empty(1, 3, size, size, device="meta"))
    except ValueError as error:
        if TOO_FEW in str(error):
            return (
                f"each part of a batch is one image, and {last or 'a layer'} then normalises one value per channel: "
                f"{REMEDY}"
            )
    except Exception:  # of code that the lab does not know, which may not run on the meta device
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def has_local_batch_norm(module: nn.Module) -> bool:
    """Return whether a network normalises over the images of one process."""
    return any(isinstance(each, _BatchNorm) and not isinstance(each, nn.SyncBatchNorm) for each in module.modules())
