"""The device of a command, and what its CPU can compute."""

import torch

from relaylab.errors import InputError
from relaylab.train.options import RuntimeOptions

# x86 instruction sets with native arithmetic in each precision, named as in `torch.cpu.get_capabilities`.
INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}


def device_of(accelerator: str) -> torch.device:
    """Return the device for `--accelerator` auto, cpu or cuda.

    Raises:
        InputError: cuda without a GPU.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("--accelerator cuda: PyTorch found no GPU on this machine")
    return torch.device("cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda")


def precision_warnings(options: RuntimeOptions) -> list[str]:
    """Return a warning if the CPU has no instructions for the precision: PyTorch then emulates it, which is slow.

    Raises:
        InputError: `--accelerator cuda` without a GPU.
    """
    needed = INSTRUCTIONS.get(options.precision)
    if needed is None or device_of(options.accelerator).type == "cuda":
        return []
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64" or any(capabilities.get(name) for name in needed):
        return []
    return [f"this CPU has no instructions for --precision {options.precision}: --precision 32 is usually faster"]
