"""What a run is: everything that can change a score, and how two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from miwv_fast.fields import shorten


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Each field by which two manifests are different runs, with the old and the new value."""
    before, now = _identity(old), _identity(new)
    contents = before.get("embedder_content"), now.get("embedder_content")
    for each in (before, now):
        # An embedder that is not at hand now is not needed either, where the neighbours are found.
        if None in contents:
            each.pop("embedder_content", None)
        elif contents[0] == contents[1]:
            each.pop("embedder", None)
    old_template, new_template = before.get("template"), now.get("template")
    if (
        isinstance(old_template, dict)
        and isinstance(new_template, dict)
        and old_template.get("source") == new_template.get("source")
    ):
        before["template"], now["template"] = old_template | {"name": None}, new_template | {"name": None}
    return list(_differing(before, now))


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What can change a score: contents, not the places they were read from."""
    identity = dict(manifest)
    data, model = identity.get("data"), identity.get("model")
    if isinstance(data, dict) and "files" in data:
        identity["data"] = {"sha256": [file["sha256"] for file in data["files"]]}
    if isinstance(model, dict):
        identity["model"] = model.get("sha256")
    return identity


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name in sorted(set(old) | set(new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differing(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}", shorten(json.dumps(before), 100), shorten(json.dumps(now), 100)
