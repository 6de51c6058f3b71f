"""What the commands of the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click

from engine_cli.options import debug_option, json_option

option = partial(click.option, show_default=True)
numbers = partial(option, metavar="N[,N…]")


def program(command: Callable[..., None]) -> click.Command:
    """What every benchmark is: a command with `--json` and `--debug` behind its own options."""
    made = click.command("command", context_settings={"help_option_names": ["-h", "--help"]})(
        command
    )
    return debug_option(json_option(made))


def gib(default: float, help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return option("--gib", type=click.FloatRange(min=0.001), default=default, help=help)


def rounds(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    help = "Of each measurement; the median counts."
    return option("--rounds", type=click.IntRange(min=1), default=default, help=help)


def list_of(option: str, text: str) -> list[int]:
    """Of an option such as 1,2,8."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as exc:
        raise click.UsageError(
            f"{option} {text!r} is not valid: give whole numbers, such as 1,2,8"
        ) from exc
