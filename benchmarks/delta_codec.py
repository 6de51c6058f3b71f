"""`python -m benchmarks.delta_codec`: what it costs to write and to apply a delta, on one thread or
on one GPU, medians of several rounds that take turns.

The weights are matrices of bf16, of which a share of the elements changes, at random places. Times
are seconds for each GB of weights: of the thread's CPU, or of the clock until the GPU is done.
*memcpy* copies the weights in the same rounds. *columns* applies the delta of whole matrices to the
right half of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import click
import torch

from benchmarks import figures, options
from benchmarks.figures import Results
from engine_cli.main import main
from engine_loader import Shard
from engine_loader.deltas.apply import apply_all
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import HEADER_NBYTES, capacity_of, directory_of, header_of
from engine_loader.deltas.stated import Change
from engine_loader.tensors.regions import describe

_SIDE = 4096  # of a matrix of 16-bit numbers: 32 MiB
_SHARES = {"0.1%": 0.001, "2%": 0.02, "10%": 0.1}
_CONTENTS = "0a" * 16, "0b" * 16
Tensors = dict[str, torch.Tensor]


def measure(gib: float, rounds: int, device: str, say: Callable[[str], None]) -> Results:
    torch.set_num_threads(1)
    count = max(1, int(gib * (1 << 30)) // (2 * _SIDE * _SIDE))
    generator = torch.Generator(device).manual_seed(1)
    before = {
        f"layer.{number}.weight": torch.randn(
            _SIDE, _SIDE, generator=generator, device=device
        ).bfloat16()
        for number in range(count)
    }
    results: Results = {}
    for name, share in _SHARES.items():
        say(f"{name} of the elements of {count} matrices")
        measured = _measure_share(before, share, rounds, generator)
        results |= {f"{name}_{figure}": value for figure, value in measured.items()}
    return results


def _measure_share(
    before: Tensors, share: float, rounds: int, generator: torch.Generator
) -> Results:
    after = {name: _changed(tensor, share, generator) for name, tensor in before.items()}
    whole = dict.fromkeys(before, Shard((_SIDE, _SIDE), (0, 0)))
    entries = describe(after, whole).tensors
    device = generator.device
    buffer = torch.zeros(capacity_of(entries, 1.1 * share), dtype=torch.uint8, device=device)
    ours = {name: tensor.clone() for name, tensor in before.items()}
    half = _SIDE // 2
    columns = {name: tensor[:, half:].clone() for name, tensor in before.items()}
    actions: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [ours[name].copy_(tensor) for name, tensor in before.items()],
        "encode": lambda: encode(entries, before, after, buffer, *_CONTENTS),
        "apply": partial(_apply, buffer, after, whole, ours, whole),
        "columns": partial(
            _apply,
            buffer,
            after,
            whole,
            columns,
            dict.fromkeys(before, Shard((_SIDE, _SIDE), (0, half))),
        ),
    }
    took: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = _now(device)
            action()
            if number:  # memory is touched for the first time in the first round
                took[name].append(_now(device) - start)
    _compare(ours, after)
    _compare(columns, {name: tensor[:, half:] for name, tensor in after.items()})
    nbytes = sum(tensor.nbytes for tensor in before.values())
    results = {
        f"{name}_s_per_gb": statistics.median(some) / (nbytes / 1e9) for name, some in took.items()
    }
    for name in ("encode", "apply", "columns"):
        results[f"{name}_to_memcpy"] = statistics.median(
            one / copy for one, copy in zip(took[name], took["memcpy"], strict=True)
        )
    header = header_of(bytes(buffer[:HEADER_NBYTES].cpu().numpy()), entries)
    results["nbytes_to_weights"] = (header.nbytes if header else 0) / nbytes
    return results


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _changed(tensor: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """In the lowest bit of its elements."""
    after = tensor.clone()
    drawn = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    after.view(torch.int16)[drawn < share] ^= 1
    return after


def _apply(
    buffer: torch.Tensor,
    source: Tensors,
    source_shards: Mapping[str, Shard],
    ours: Tensors,
    shards: Mapping[str, Shard],
) -> None:
    """As a reader does that has all of the buffer."""
    entries = describe(source, source_shards).tensors
    header = header_of(bytes(buffer[:HEADER_NBYTES].cpu().numpy()), entries)
    if header is None:
        raise RuntimeError("the delta did not fit into its buffer")
    listed = buffer[header.directory_offset : header.nbytes]
    sections = directory_of(header, bytes(listed.cpu().numpy()), entries)
    changes = [
        Change(sections[src.name], src, ours[src.name], dst)
        for src, dst in zip(entries, describe(ours, shards).tensors, strict=True)
    ]
    apply_all(buffer, changes)


def _compare(ours: Tensors, after: Tensors) -> None:
    for name, tensor in after.items():
        if not torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)):
            raise RuntimeError(f"{name} is not what it was changed to")


@options.program
@options.gib(0.5, "Size of the weights.")
@options.rounds(5)
@click.option("--device", default="cpu", show_default=True, help="cpu, or a GPU such as cuda:0.")
def command(gib: float, rounds: int, device: str, as_json: bool) -> None:
    """Writing and applying deltas, on one thread or one GPU. Takes a minute."""
    figures.report(measure(gib, rounds, device, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.delta_codec")
