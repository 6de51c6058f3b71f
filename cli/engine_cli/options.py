"""Options that commands share, and what is made of them; `connection.py` has those for etcd."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from engine_registry.schema.keys import MAX_RANKS
from engine_registry.schema.numbers import MAX_TTL_S, MIN_TTL_S, MIN_UNRESPONSIVE_S

Command = TypeVar("Command", bound=Callable[..., Any])
LOCATION_VARIABLE = "ENGINES_LOCATION"
TOKEN_VARIABLE = "ENGINES_GATEWAY_TOKEN"  # noqa: S105  the variable's name, not a token

_debug = False


def debugging() -> bool:
    return _debug


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    global _debug
    _debug = _debug or value


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show tracebacks and the transfer engine's log.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: one object, or one line an event."
)
_MAX_SECONDS = 365 * 24 * 3600  # more is a slip, and some of what measures time overflows


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    def __init__(self, min: float = 0, min_open: bool = False, max: float = _MAX_SECONDS) -> None:
        super().__init__(min=min, min_open=min_open, max=max)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


TTL = Seconds(MIN_TTL_S, max=MAX_TTL_S)
HOLD = Seconds(max=MAX_TTL_S)
UNRESPONSIVE_AFTER = Seconds(MIN_UNRESPONSIVE_S, max=MAX_TTL_S)
WORLD_SIZE = click.IntRange(1, MAX_RANKS)


def nbytes_of(text: str) -> int:
    """The type of an option: a number of bytes, one at least, as in 500MB or 1.5GiB."""
    size = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([kmgt])(i)?)?b?", text.strip().lower()
    )
    nbytes = (
        int(float(size[1]) * (1024 if size[3] else 1000) ** " kmgt".index(size[2] or " "))
        if size
        else 0
    )
    if nbytes < 1:
        raise click.BadParameter(
            f"{text!r} is not a size: use a number of bytes, or a unit as in 500MB, 5GB or 1.5GiB."
        )
    return nbytes


def host_option(help: str) -> Callable[[Command], Command]:
    """Where peers find this machine."""
    return click.option(
        "--host", callback=_own_host, help=f"{help} Default: the one that etcd sees."
    )


def _own_host(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    from engine_registry.schema.address import why_not_advertised

    if problem := why_not_advertised(value.strip("[]")) if value is not None else "":
        raise click.BadParameter(
            f"{problem}: give an address of this machine that peers can reach."
        )
    return value


def rank_option(required: bool, help: str) -> Callable[[Command], Command]:
    return click.option(
        "--rank", type=click.IntRange(0, MAX_RANKS - 1), required=required, help=help
    )


def given_labels(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """Of KEY=VALUE, as often as it is given."""
    from engine_registry.schema.labels import check_labels

    return check_labels(pairs_of(values, "KEY=VALUE, such as team=search"))


def pairs_of(values: Iterable[str], form: str) -> dict[str, str]:
    """Of texts with `=`. BadParameter says which `form` they have."""
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not {form}.")
        if pairs.setdefault(name, value) != value:
            raise click.BadParameter(f"{name} is given with two values.")
    return pairs


def label_option(help: str) -> Callable[[Command], Command]:
    """Which labels an instance gets."""
    return click.option(
        "--label",
        "labels",
        multiple=True,
        metavar="KEY=VALUE",
        callback=given_labels,
        help=f"{help} May be given several times.",
    )


def _given_location(ctx: click.Context, param: click.Parameter, value: str) -> str:
    from engine_registry.schema.location import Location

    return str(Location.parse(value))


location_option = click.option(
    "--location",
    default="",
    metavar="ZONE[/RACK[/NODE]]",
    envvar=LOCATION_VARIABLE,
    show_envvar=True,
    callback=_given_location,
    help="Where this machine stands; a name that is not known may be empty. Near sources are read "
    "first, and those of another zone only where this one has none.",
)


selector_option = click.option(
    "--label",
    "selector",
    multiple=True,
    metavar="SELECTOR",
    callback=lambda ctx, param, values: ",".join(values),
    help="Instances with these labels only: KEY=VALUE, KEY!=VALUE, KEY or !KEY, with commas "
    "between them. May be given several times.",
)


def gateway_token() -> str | None:
    token = os.environ.get(TOKEN_VARIABLE)
    if token == "":
        raise click.UsageError(f"{TOKEN_VARIABLE} is empty: give a token, or unset it")
    return token


@contextmanager
def engine_log() -> Iterator[None]:
    """Keeps what the transfer engine's C++ code writes to stderr off the user's terminal, unless
    --debug is given.

    Our own messages go on: `sys.stderr` is moved to a copy of the descriptor.
    """
    if debugging():
        yield
        return
    sys.stderr.flush()
    ours = sys.stderr
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, os.fdopen(kept, "w", buffering=1, closefd=False) as copy:
        os.dup2(nowhere.fileno(), 2)
        _redirect_logging(ours, copy)
        sys.stderr = copy
        try:
            yield
        finally:
            copy.flush()
            sys.stderr = ours
            _redirect_logging(copy, ours)
            os.dup2(kept, 2)
            os.close(kept)


def _redirect_logging(old: Any, new: Any) -> None:
    import logging

    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)
