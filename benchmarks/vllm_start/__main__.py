"""`python -m benchmarks.vllm_start`: seconds from the start of vLLM to its first token.

Each is a separate process with a random Llama: from the disk with its files in the page cache,
from the disk without them, and from a vLLM that runs. They take turns. They run on CPUs after
`scripts/engines_setup.sh vllm`, or with `--python` in any environment that has a vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from benchmarks import figures, options
from benchmarks.figures import Results, say
from engine_cli.main import main
from engine_registry.etcd.local import LocalEtcd

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".engines" / "vllm" / "bin" / "python"
_HIDDEN, _PER_LAYER = 1024, 2 * (3 * 1024 * 2048 + 2 * 1024 * 1024 + 2 * 1024 * 128)


@contextmanager
def running(python: Path, request: dict[str, Any], log: Path) -> Iterator[dict[str, Any]]:
    """A program of the benchmark, with what it has printed."""
    with log.open("a") as errors:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.vllm_start.program", json.dumps(request)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(log.parent)},
        )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the program has no pipes")
    try:
        for line in process.stdout:  # vLLM logs there too
            if line.startswith("{"):
                yield json.loads(line)
                break
        else:
            raise click.ClickException(f"vLLM has failed: {log.read_text()[-3000:]}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with vLLM's own processes
        process.stdin.close()
        process.stdout.close()
        process.wait()


def forget(folder: str) -> None:
    """Takes its files out of the page cache."""
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(python: Path, gib: float, rounds: int) -> Results:
    took: dict[str, list[dict[str, Any]]] = {"disk": [], "disk_cold": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix="engines-bench-") as work, LocalEtcd() as etcd:
        model, log = f"{work}/llama", Path(work, "log")
        layers = max(1, round(gib * (1 << 30) / _PER_LAYER))
        say(f"a checkpoint of {layers} layers")
        shape = {"hidden": _HIDDEN, "layers": layers}
        with running(python, {"kind": "llama", "folder": model, **shape}, log):
            pass
        ours = {
            "load_format": "engine_registry",
            "model_loader_extra_config": {
                "etcd": etcd.endpoint,
                "host": "127.0.0.1",
                "model": "llama",
                "required": True,
            },
        }
        say("the source")
        with running(python, _request(model, ours), log) as source:
            for number in range(rounds):
                for name, seconds in took.items():
                    say(f"{name}, round {number + 1} of {rounds}")
                    if name == "disk_cold":
                        forget(model)
                    settings = ours if name == "peer" else {}
                    with running(python, _request(model, settings), log) as found:
                        if found["token"] != source["token"]:
                            raise click.ClickException(f"{name} has generated another token")
                        seconds.append(found)
                        say(f"the first token came after {found['first_token_s']:.1f} s")
    return _results(took, source)


def _request(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "settings": settings, "began": time.monotonic()}


def _results(took: dict[str, list[dict[str, Any]]], source: dict[str, Any]) -> Results:
    results: Results = {}
    for name, found in took.items():
        for part in ("import_s", "engine_s", "first_token_s"):
            values = [one[part] for one in found]
            results[f"{name}_{part}"] = statistics.median(values)
            if part == "first_token_s":
                results |= {f"{name}_{part}_least": min(values), f"{name}_{part}_most": max(values)}
    loads = [one["loader"][0] for one in took["peer"]]
    results["peer_load_s"] = statistics.median(load["seconds"] for load in loads)
    results["peer_nbytes"] = loads[0]["nbytes"]
    results["kept_nbytes"] = loads[0]["extra_nbytes"]
    results["source_first_token_s"] = source["first_token_s"]
    return results


@options.program
@options.gib(0.5, "Bytes of the checkpoint's layers.")
@options.rounds(3)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    default=PYTHON,
    help="The interpreter of an environment with vLLM and engine-registry.",
)
def command(gib: float, rounds: int, python: Path, as_json: bool) -> None:
    """From the start of vLLM to its first token: from its disk, and from a peer."""
    if not python.exists():
        raise click.ClickException(
            f"there is no {python}: run scripts/engines_setup.sh vllm, or give another --python"
        )
    figures.report(measure(python, gib, rounds), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.vllm_start")
