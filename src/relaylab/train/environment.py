"""The environment of a run for environment.json: commit, package versions and machine."""

import functools
import os
import platform
import subprocess
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from relaylab.recipes.schema import LIBRARIES, NetworkConfig

PACKAGES = ("relaybackprop", "torch", "torchvision", "lightning-fabric", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """Return the commit of the checkout (None outside one), the package versions, and the machine."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def network_versions(network: NetworkConfig) -> dict[str, str]:
    """Return the version of the library that defines a network, or the hash of its Python file."""
    module = network.architecture.rpartition(":")[0]
    if module in LIBRARIES:
        return {module: metadata.version(module)}
    if network.is_code and Path(module).is_file():
        return {Path(module).name: sha256(Path(module).read_bytes()).hexdigest()[:12]}
    return {}


@functools.cache
def commit() -> str | None:
    """Return the commit of the checkout of this file, marked if files are modified; None outside a checkout."""
    source = Path(__file__).resolve().parents[2]
    if source.name != "src":  # an installed package, possibly inside another repository
        return None
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10, "cwd": source}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", source], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (" with local changes" if changed else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
