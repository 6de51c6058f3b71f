"""What the benchmarks share: timing, percentiles, processes to measure against, and how results are
printed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata

import click

from engine_cli.options import debug_option, json_option
from engine_cli.render.tables import print_json
from engine_cli.runtime.children import python


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_s(action: Callable[[], object], rounds: int = 5) -> float:
    return statistics.median(seconds(action) for _ in range(rounds))


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def numbers(option: str, text: str) -> list[int]:
    """Of an option such as 1,2,8."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as exc:
        raise click.UsageError(
            f"{option} {text!r} is not valid: give whole numbers, such as 1,2,8"
        ) from exc


def program(command: Callable[..., None]) -> click.Command:
    """What every benchmark is: a command with `--json` and `--debug` behind its own options."""
    made = click.command("command", context_settings={"help_option_names": ["-h", "--help"]})(
        command
    )
    return debug_option(json_option(made))


rounds_option = click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Of each measurement; the median counts.",
)


def say(what: str) -> None:
    click.echo(f"measuring: {what}", err=True)


def call(module: str, function: str, *args: str) -> list[str]:
    """The command that runs `module.function(*args)`."""
    return python(f"from {module} import {function} as run; run(*sys.argv[1:])", *args)


@contextmanager
def another_process(
    module: str, function: str, *args: str, within: Callable[..., list[str]] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One that runs `module.function(*args)` until the block ends (it sees the end of its standard
    input), and its first line.

    `within`: the `command` of a Host, to run it there, where Ctrl-C does not reach it.
    """
    command = call(module, function, *args)
    with _process(
        within(*command) if within is not None else command, start_new_session=within is not None
    ) as process:
        yield process, _first_line(process, f"{module}.{function}")


@contextmanager
def several_processes(
    module: str, function: str, calls: Sequence[Sequence[str]]
) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Started at the same time, one for each list of arguments; the first lines of all of them have
    come.
    """
    with ExitStack() as stack:
        started = [stack.enter_context(_process(call(module, function, *args))) for args in calls]
        yield [(process, _first_line(process, f"{module}.{function}")) for process in started]


@contextmanager
def _process(
    command: Sequence[str], *, start_new_session: bool = False
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )
    with process:
        try:
            yield process
        finally:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _first_line(process: subprocess.Popen[str], name: str) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise click.ClickException(
            f"{name} did not come to its first line: --debug shows what it said"
        )
    return line.strip()


def machine() -> dict[str, object]:
    versions = {
        name: metadata.version(name) for name in ("engine-registry", "etcd3", "grpcio", "protobuf")
    }
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def report(results: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "machine": machine(),
                "results": {name: round(value, 6) for name, value in results.items()},
            }
        )
        return
    for name, value in results.items():
        click.echo(f"{name:56} {value:12.4f}")
