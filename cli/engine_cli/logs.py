"""What the commands log: one sentence a line for people, or with --log-json one JSON object a line
for machines; on stderr.

The libraries log and decide nothing. Who runs `engines` decides here what is shown and how.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeVar

import click

from engine_cli.render.printable import printable
from engine_cli.wording import in_options
from engine_registry.schema.moment import utc

Command = TypeVar("Command", bound=Callable[..., Any])
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Of other packages nothing below a warning is logged: nobody knows what they would print.
_LOGGERS = ("engine_registry", "engine_loader", "engine_cli")

_json = False


class _Sentence(logging.Formatter):
    """What others have written into etcd may be part of it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(in_options(super().formatMessage(record)))


class _Json(logging.Formatter):
    """In ASCII, so it holds nothing that a terminal would act on."""

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {
            "time": utc(datetime.fromtimestamp(record.created, timezone.utc)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "fields": getattr(record, "fields", {}),
        }
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return json.dumps(data, separators=(",", ":"), default=str)


def begin() -> None:
    """For the whole process: warnings and errors, as sentences, until the options say otherwise."""
    global _json
    _json = False
    for name, level in _LEVELS.items():
        logging.addLevelName(level, name)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Sentence("engines: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def as_json() -> bool:
    return _json


def _set_level(ctx: click.Context, param: click.Parameter, value: str) -> None:
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(_LEVELS[value])


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    global _json
    _json = value
    if value:
        logging.captureWarnings(True)
        for handler in logging.getLogger().handlers:
            if isinstance(handler.formatter, _Sentence):
                handler.setFormatter(_Json())


def log_options(command: Command) -> Command:
    """For commands that run for long."""
    options = [
        click.option(
            "--log-level",
            type=click.Choice(list(_LEVELS)),
            default="warning",
            show_default=True,
            expose_value=False,
            is_eager=True,
            callback=_set_level,
            help="What is logged on stderr.",
        ),
        click.option(
            "--log-json",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_set_json,
            help="Log JSON, one object a line: time, level, logger, message, fields.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
