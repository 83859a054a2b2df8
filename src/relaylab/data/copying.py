"""Asynchronous copies to a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device: to a GPU asynchronously, from pinned memory.

    From ordinary memory, the host would wait until the GPU has executed all that was launched before. PyTorch keeps the
    pinned memory until the copy has been made.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
