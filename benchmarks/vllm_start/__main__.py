"""`python -m benchmarks.vllm_start`: seconds from the start of vLLM to its first token.

Each is a separate process with a random Llama. Without `--compile`: from the disk with its files in
the page cache, from the disk without them, from a vLLM that runs, and from the memory that one has
left which was killed. With it, vLLM compiles the model: with the weights from the disk or from a
peer and an empty compile cache, with weights and compile cache from a peer, and with a compile
cache that is on the disk. They take turns. They run on CPUs after `scripts/engines_setup.sh vllm`,
or with `--python` in any environment that has a vLLM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from benchmarks import figures, options
from benchmarks.figures import Results, say
from engine_cli.main import main
from engine_registry.etcd.local import LocalEtcd

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".engines" / "vllm" / "bin" / "python"
_LINE = re.compile(r"(\d+\.\d{3}) (.*)")  # as `program.LOGGING` has it
_PARTS = ("Starting to load model", "Warming up model for the compilation", "Warming up done")
_WITHOUT_COMPILER = ("disk", "disk_cold", "peer", "held")
_HOLD_S = 120.0
_HIDDEN, _PER_LAYER = 1024, 2 * (3 * 1024 * 2048 + 2 * 1024 * 1024 + 2 * 1024 * 128)


@contextmanager
def running(
    python: Path, request: dict[str, Any], log: Path, cache: str = ""
) -> Iterator[dict[str, Any]]:
    """A program of the benchmark, with what it has printed. `cache` is vLLM's folder of caches."""
    with log.open("a") as errors:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.vllm_start.program", json.dumps(request)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TMPDIR": tempfile.mkdtemp(dir=log.parent),  # another cache of torch is there
                **({"VLLM_CACHE_ROOT": cache} if cache else {}),
            },
        )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the program has no pipes")
    try:
        logged: list[str] = []
        for line in process.stdout:  # vLLM logs there too
            if line.startswith("{"):
                yield json.loads(line) | {"parts": parts_of(logged)}
                break
            logged.append(line)
        else:
            raise click.ClickException(f"vLLM has failed: {log.read_text()[-3000:]}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with vLLM's own processes
        process.stdin.close()
        process.stdout.close()
        process.wait()


def parts_of(logged: list[str]) -> dict[str, float]:
    """Seconds of parts of a start, by vLLM's log; empty where it logs other lines, as on GPUs."""
    times: dict[str, float] = {}
    for line in logged:
        found = _LINE.search(line)
        for part in _PARTS:
            if found is not None and part in found[2]:
                times.setdefault(part, float(found[1]))
    if len(times) < len(_PARTS):
        return {}
    begun, loaded, compiled = (times[part] for part in _PARTS)
    return {"load_s": loaded - begun, "compile_s": compiled - loaded}


def forget(folder: str) -> None:
    """Takes its files out of the page cache."""
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(python: Path, gib: float, rounds: int, compiling: bool) -> Results:
    rows = ("disk", "disk_own_cache", "peer", "peer_artifacts") if compiling else _WITHOUT_COMPILER
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory(prefix="engines-bench-") as work, LocalEtcd() as etcd:
        model, log = f"{work}/llama", Path(work, "log")
        layers = max(1, round(gib * (1 << 30) / _PER_LAYER))
        say(f"a checkpoint of {layers} layers")
        shape = {"hidden": _HIDDEN, "layers": layers}
        with running(python, {"kind": "llama", "folder": model, **shape}, log):
            pass
        own_cache = f"{work}/own" if compiling else ""

        def start(name: str) -> AbstractContextManager[dict[str, Any]]:
            settings = {}
            if name.startswith(("peer", "source", "held", "killed")):
                artifacts = compiling and name != "peer"
                hold_s = _HOLD_S if name == "killed" else 0.0
                settings = _ours(etcd.endpoint, artifacts=artifacts, hold_s=hold_s)
            if name == "disk_cold":
                forget(model)
            cache = own_cache if name == "disk_own_cache" or not compiling else f"{work}/cold"
            if cache == f"{work}/cold":
                shutil.rmtree(cache, ignore_errors=True)
            request = {
                "model": model,
                "settings": settings,
                "compiling": compiling,
                "began": time.monotonic(),
            }
            return running(python, request, log, cache)

        if compiling:
            say("the compile cache on the disk")
            for _ in range(2):  # the second start adds to what the first has left
                with start("disk_own_cache"):
                    pass
        say("the source")
        with start("source") as source:
            for number in range(rounds):
                for name, found in took.items():
                    say(f"{name}, round {number + 1} of {rounds}")
                    if name == "held":
                        with start("killed"):
                            pass
                    with start(name) as one:
                        _check_source(name, one)
                        if one["token"] != source["token"]:
                            raise click.ClickException(f"{name} has generated another token")
                        found.append(one)
                        say(f"the first token came after {one['first_token_s']:.1f} s")
    return _results(took, source)


def _check_source(name: str, one: dict[str, Any]) -> None:
    """A start that has fallen back to its disk is no figure."""
    found = one["loader"][0]["source"] if one.get("loader") else "disk"
    wanted = {"held": "held", "peer": "peers", "peer_artifacts": "peers"}.get(name, "disk")
    if found != wanted:
        raise click.ClickException(f"the weights of {name} came from {found}")


def _ours(endpoint: str, *, artifacts: bool, hold_s: float) -> dict[str, Any]:
    return {
        "load_format": "engine_registry",
        "model_loader_extra_config": {
            "etcd": endpoint,
            "host": "127.0.0.1",
            "model": "llama",
            "required": True,
            "artifacts": artifacts,
            "hold_s": hold_s,
        },
    }


def _results(took: dict[str, list[dict[str, Any]]], source: dict[str, Any]) -> Results:
    results: Results = {}
    for name, found in took.items():
        for one in found:
            parts = one["parts"]
            if parts:
                named = one["import_s"] + sum(parts.values())
                one |= {**parts, "rest_s": one["first_token_s"] - named}
        for part in ("import_s", "load_s", "compile_s", "rest_s", "engine_s", "first_token_s"):
            values = [one[part] for one in found if part in one]
            if values:
                results[f"{name}_{part}"] = statistics.median(values)
        values = [one["first_token_s"] for one in found]
        results |= {f"{name}_first_token_s_least": min(values)}
        results |= {f"{name}_first_token_s_most": max(values)}
        for caches in [one["compile_caches"] for one in found if one.get("compile_caches")][:1]:
            kept = ("fetched", "added", "graphs_found", "graphs_missed", "nbytes", "pull_s")
            results |= {f"{name}_cache_{part}": caches[0][part] for part in (*kept, "publish_s")}
    for name in ("held", "peer"):
        loads = [one["loader"][0] for one in took.get(name, [])]
        if loads:
            results[f"{name}_weights_s"] = statistics.median(load["seconds"] for load in loads)
    results["peer_nbytes"] = loads[0]["nbytes"]
    results["kept_nbytes"] = loads[0]["extra_nbytes"]
    results["source_first_token_s"] = source["first_token_s"]
    return results


@options.program
@options.gib(0.5, "Bytes of the checkpoint's layers.")
@options.rounds(3)
@click.option(
    "--compile", "compiling", is_flag=True, help="vLLM compiles the model, with empty caches."
)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    default=PYTHON,
    help="The interpreter of an environment with vLLM and engine-registry.",
)
def command(gib: float, rounds: int, python: Path, compiling: bool, as_json: bool) -> None:
    """From the start of vLLM to its first token: from its disk, from a peer, and from memory that
    was held.
    """
    if not python.exists():
        raise click.ClickException(
            f"there is no {python}: run scripts/engines_setup.sh vllm, or give another --python"
        )
    figures.report(measure(python, gib, rounds, compiling), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.vllm_start")
