"""Optional packages: imported where they are used, with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """The module, which comes with an extra of this package. Raises ValueError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise ValueError(f"this needs the package {package}: pip install 'miwv-fast[{extra}]'") from error
