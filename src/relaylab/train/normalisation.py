"""Check batch normalisation with micro-batches of one image: an error if a channel then has a single value."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from relaylab.errors import InputError
from relaylab.models.building import build_relay
from relaylab.recipes.schema import Recipe

REMEDY = "use a smaller --accumulate, fewer devices or a larger optimizer.batch_size"
TOO_FEW = "Expected more than 1 value per channel"  # PyTorch's message


def single_image_problem(recipe: Recipe) -> str | None:
    """Return an error message if a recipe's network cannot normalise a batch of one image.

    The network runs on the meta device. With two or more images, each channel has at least two values.
    """
    size = recipe.network.image_size
    last = ""
    try:
        relay = build_relay(recipe, on_meta=True).train()
    except InputError:
        return None  # other checks report errors of the recipe

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
                f"with one image per micro-batch, {last or 'a layer'} would normalise a single value per channel: "
                f"{REMEDY}"
            )
    except Exception:  # the user's code may not run on the meta device
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def has_local_batch_norm(module: nn.Module) -> bool:
    """Return whether a network has batch normalisation that is not synchronised across processes."""
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in module.modules())
