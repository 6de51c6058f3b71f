"""The checkpoint of docker-compose.yml: made before the seeds start, and compared with what the
loader got.

python testbed.py make FOLDER          writes one safetensors file a rank, the same bytes every
                                       time; files that are there stay
python testbed.py check FOLDER FOLDER  exit code 0 if both hold the same tensors, byte for byte
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from engine_loader.files.weights import read_weights, write_weights

RANKS = 2
LAYERS = 8  # a rank
WIDTH, HIDDEN, VOCABULARY = 512, 1408, 16_000


def make(folder: Path) -> None:
    for rank in range(RANKS):
        path = folder / f"rank-{rank}.safetensors"
        if not path.exists():  # seeds may be reading it
            write_weights(stage(rank), path)
        say(f"{path}: {path.stat().st_size:,} bytes")


def stage(rank: int) -> dict[str, torch.Tensor]:
    """What a pipeline stage of a small decoder holds: bfloat16 matrices, float32 norms."""
    random = torch.Generator().manual_seed(rank)
    layers = range(rank * LAYERS, (rank + 1) * LAYERS)
    shapes = {"embed_tokens.weight" if rank == 0 else "lm_head.weight": (VOCABULARY, WIDTH)}
    for layer in layers:
        shapes |= {
            f"layers.{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"
        }
        shapes |= {
            f"layers.{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")
        }
        shapes |= {f"layers.{layer}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
    weights = {
        name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()
    }
    norms = {f"layers.{layer}.norm.weight": torch.rand(WIDTH, generator=random) for layer in layers}
    return weights | norms


def check(folder: Path, other: Path) -> None:
    for rank in range(RANKS):
        name = f"rank-{rank}.safetensors"
        wanted, found = read_weights([folder / name]), read_weights([other / name])
        if set(wanted) != set(found):
            raise SystemExit(f"{name}: the tensors differ in name")
        for tensor, ours in wanted.items():
            theirs = found[tensor]
            if ours.dtype != theirs.dtype or not torch.equal(raw(ours), raw(theirs)):
                raise SystemExit(f"{name}: {tensor} differs")
        say(
            f"{name}: {len(wanted)} tensors, "
            f"{sum(tensor.nbytes for tensor in wanted.values()):,} bytes, verified"
        )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that a NaN equals itself; the last dimension distinguishes shapes."""
    return tensor.contiguous().view(torch.uint8)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["check", folder, other]:
            check(Path(folder), Path(other))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
