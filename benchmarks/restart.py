"""`python -m benchmarks.restart`: how soon an engine that was killed computes a token again.

The engine is a torch model with the shapes of vLLM's Llama and random weights, on the host or on a
GPU. It starts with `load_or_seed`: from what the killed one has left with its keeper (`held`), from
one that runs (`peers`), or from a safetensors file in the page cache (`disk`). Each start is a new
process, and all have to compute the same token. Medians of several rounds, in seconds from the
start of the process:

| figure | until |
|---|---|
| `import_s` | Python runs, and torch and all of ours are imported |
| `device_s` | the GPU is in use; on the host nothing |
| `weights_s` | the model has its weights, and peers can read them |
| `token_s` | the first token is there |

`disk` and `peers` make digests of what they have loaded, as they could be killed next; `held` has
compared them. `second_token_s` is what another token takes, once all kernels are loaded.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks import figures, options
from benchmarks.figures import Results
from benchmarks.left import keepers_end, killed, wait_until_held
from benchmarks.processes import another_process
from benchmarks.serving import HOST, MODEL
from engine_cli.main import main
from engine_loader import Arena, PublishOptions, load_or_seed, open_engine
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

_VOCABULARY, _HEAD = 32_000, 128
_TOKEN = 7  # the prompt
_KEY = "/engines/restart/0"
_MODULE = __name__ if __name__ != "__main__" else "benchmarks.restart"
SOURCES = ("held", "peers", "disk")


class Linear(nn.Module):
    """As vLLM makes them: filled later."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(rows, columns, dtype=torch.bfloat16), requires_grad=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight)


class Layer(nn.Module):
    """Of a Llama, with queries, keys and values in one tensor, and gate and up in another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = Linear(1, width)
        self.qkv = Linear(width + width // 2, width)  # four queries a key
        self.out = Linear(width, width)
        self.gate_up = Linear(7 * width, width)
        self.down = Linear(width, 7 * width // 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of one token, which attends to itself alone."""
        value = self.qkv(self._normed(hidden))[..., -(self.width // 4) :]
        heads = value.unflatten(-1, (-1, _HEAD)).repeat_interleave(4, dim=-2).flatten(-2)
        hidden = hidden + self.out(heads)
        gate, up = self.gate_up(self._normed(hidden)).chunk(2, dim=-1)
        more: torch.Tensor = self.down(functional.silu(gate) * up)
        return hidden + more

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, (self.width,), self.norm.weight[0])


class Llama(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = Linear(_VOCABULARY, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = Linear(_VOCABULARY, width)

    def forward(self, token: int) -> int:
        """The next token."""
        hidden = self.embed.weight[token]
        for layer in self.layers:
            hidden = layer(hidden)
        return int(self.head(hidden).argmax())


def measure(gib: float, rounds: int, device: str, say: Callable[[str], None]) -> Results:
    width = 4096 if gib >= 4 else 512
    layer_nbytes = sum(one.nbytes for one in _made(width, 1).layers.parameters())
    layers = max(1, round(gib * (1 << 30) / layer_nbytes))
    shape = (str(width), str(layers))
    with tempfile.TemporaryDirectory(prefix="restart") as folder:
        path = str(Path(folder, "model.safetensors"))
        _write(path, width, layers)
        samples: dict[str, list[Results]] = {}
        for source in SOURCES:
            say(f"{source}: {layers} layers of {layer_nbytes >> 20} MiB on {device}")
            samples[source] = _starts(source, rounds, (device, *shape, path))
    tokens = {one.pop("token") for some in samples.values() for one in some}
    if len(tokens) != 1:
        raise click.ClickException(f"the starts have computed {len(tokens)} different tokens")
    return {
        f"{source}_{name}": statistics.median(one[name] for one in some)
        for source, some in samples.items()
        for name in some[0]
    }


def _starts(source: str, rounds: int, args: tuple[str, ...]) -> list[Results]:
    found: list[Results] = []
    with ExitStack() as stack:
        endpoint = stack.enter_context(LocalEtcd()).endpoint
        stack.enter_context(keepers_end(_KEY))

        def call(instance: str = "restart") -> tuple[str, ...]:
            return (_MODULE, "start", endpoint, instance, *args, str(time.monotonic()))

        if source == "peers":
            stack.enter_context(another_process(*call("peer")))
        if source == "held":
            with killed(*call()):
                pass
        for _ in range(rounds + 1):
            if source == "held":
                wait_until_held(_KEY)
                with killed(*call()) as line:
                    found.append(_checked(line, source))
            else:
                with another_process(*call()) as (_, line):
                    found.append(_checked(line, source))
    return found[1:]  # files are in the page cache from here on


def _checked(line: str, wanted: str) -> Results:
    found: dict[str, float] = json.loads(line)
    source = SOURCES[int(found.pop("source"))]
    if source != wanted:
        raise click.ClickException(f"the weights came from {source}, not from {wanted}")
    return found


def _made(width: int, layers: int) -> Llama:
    with torch.device("meta"):
        return Llama(width, layers)


def _write(path: str, width: int, layers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(1 << 20, generator=generator) - 0.5  # of it all weights are cut
    tensors = {}
    for number, (name, like) in enumerate(_made(width, layers).named_parameters()):
        repeats = -(-like.numel() // len(block))
        values = block.roll(number).repeat(repeats)[: like.numel()].reshape(like.shape)
        tensors[name] = (values * (2 / like.shape[-1] ** 0.5)).to(like.dtype)
    save_file(tensors, path)


def start(
    endpoint: str, instance: str, device: str, width: str, layers: str, path: str, began: str
) -> None:
    """An engine, until its standard input ends or it is killed."""
    since = float(began)
    times = {"import_s": time.monotonic() - since}
    if device != "cpu":
        torch.zeros(1, device=device)
    times["device_s"] = time.monotonic() - since
    model = _made(int(width), int(layers))
    tensors = dict(model.named_parameters())

    def allocate() -> None:
        nbytes = sum(one.nbytes + 512 for one in tensors.values())
        with Arena(device, nbytes) as arena, torch.no_grad():
            for one in tensors.values():
                with_memory = nn.Parameter(arena.empty(one.shape, one.dtype), requires_grad=False)
                torch.utils.swap_tensors(one, with_memory)

    protocol = "socket" if device == "cpu" else "cuda_ipc"
    with Registry.connect(endpoint) as registry, open_engine(HOST, protocol) as engine:
        with load_or_seed(
            registry,
            engine,
            MODEL,
            tensors,
            rank=0,
            world_size=1,
            instance=instance,
            fallback=path,
            allocate=allocate,
            publish=PublishOptions(hold_s=60, digests=True),
        ) as seeded:
            times["weights_s"] = time.monotonic() - since
            token = model(_TOKEN)
            times["token_s"] = time.monotonic() - since
            second = time.monotonic()
            model(_TOKEN)
            times["second_token_s"] = time.monotonic() - second
            source = SOURCES.index(seeded.source)
            click.echo(json.dumps({**times, "token": token, "source": source}))
            sys.stdin.read()


@options.program
@options.gib(0.5, "Size of the weights.")
@options.rounds(3)
@options.option("--device", default="cpu", help="cpu, or a GPU such as cuda:0.")
def command(gib: float, rounds: int, device: str, as_json: bool) -> None:
    """How soon a killed engine computes again. Takes a minute, and as much disk as the weights."""
    figures.report(measure(gib, rounds, device, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.restart")
