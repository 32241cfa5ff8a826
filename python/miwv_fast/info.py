"""What a bug report needs: versions, how the kernels were built, what the machine offers."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from miwv_fast import ops

_PACKAGES = ("miwv-fast", "torch", "transformers", "sentence-transformers", "pyarrow", "numpy")


def info() -> dict[str, Any]:
    """What a bug report needs: versions (None where absent), the kernels' build, processor, threads, and GPU."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "extras": _extras(),
        "kernels": ops.build_info(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count()},
        "cuda": {"torch": torch.version.cuda, "driver": _driver(), "gpus": _gpus()},
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _extras() -> dict[str, dict[str, str | None]]:
    """For each optional part of this package what it needs, and the versions there are."""
    try:
        needed = requires("miwv-fast") or []
    except PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in needed:
        found = re.match(r"""([\w.-]+).*\bextra\s*==\s*["']([\w-]+)["']""", line)
        if found and found[2] != "test":
            extras.setdefault(found[2], {})[found[1]] = _version(found[1])
    return extras


def _driver() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory >> 20} MiB, sm_{device.major}{device.minor}" for device in devices]


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str | None]:
    """The versions of packages, None where one is absent."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
