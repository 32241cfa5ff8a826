"""What a bug report needs: versions, how the kernels were built, what the machine offers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from miwv_fast import ops

_PACKAGES = ("miwv-fast", "torch", "transformers", "sentence-transformers", "pyarrow", "numpy", "datasets", "gguf")


def info() -> dict[str, Any]:
    """Versions of the packages in use (None where absent), the kernels' build, and the device."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "kernels": ops.build_info(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str | None]:
    """The versions of packages, None where one is absent."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
