"""Renders a folder as `kubectl kustomize` does, as far as deploy/kubernetes uses it: resources,
components and images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    manifests: list[Manifest] = []
    for name in [*settings.pop("resources"), *settings.pop("components", [])]:
        path = folder / name
        if path.is_dir():
            manifests += render(path)
        else:
            manifests += yaml.safe_load_all(path.read_text())
    for image in settings.pop("images", []):
        _set_image(manifests, **image)
    if unknown := set(settings) - {"apiVersion", "kind"}:
        raise NotImplementedError(f"{folder}: {unknown}")
    return manifests


def _set_image(where: Any, *, name: str, newName: str, newTag: str) -> None:
    if isinstance(where, list):
        for each in where:
            _set_image(each, name=name, newName=newName, newTag=newTag)
    elif isinstance(where, dict):
        for key, value in where.items():
            if key == "image" and value.rpartition(":")[0] == name:
                where[key] = f"{newName}:{newTag}"
            else:
                _set_image(value, name=name, newName=newName, newTag=newTag)
