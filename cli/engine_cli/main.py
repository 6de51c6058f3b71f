"""The entry point: finds the command, and turns every error into one line on stderr and a
documented exit code.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import click

from engine_cli import logs
from engine_cli.connection import options_before_the_command
from engine_cli.exits import Exit, code_of
from engine_cli.options import debugging
from engine_cli.render.printable import printable
from engine_cli.signals import Ended
from engine_cli.suggestions import did_you_mean
from engine_cli.wording import said

# In the order of `engines --help`. A command's module is imported only when it is asked for, so
# that help is quick.
COMMANDS = {
    "register": "Serve safetensors files from memory as one rank of an instance.",
    "list": "All instances: state, ranks, model, version, size.",
    "show": "One instance: its ranks, and on request their tensors.",
    "watch": "Ranks and instances as they come and go.",
    "events": "What has happened, as a watch has kept it.",
    "wait": "Until an instance is ready, or gone.",
    "load": "Copy weights from a running instance: one rank's, or all as whole tensors.",
    "verify": "Whether ranks that should hold the same do, by their digests.",
    "diff": "The tensors in which two instances differ.",
    "artifacts": "Compile caches and other folders, from peers: push, pull, list.",
    "release": "Say which version of an instance loads take that ask for the released one.",
    "evict": "Take ranks out of the registry.",
    "doctor": (
        "What keeps etcd, this machine or the ranks of an instance from working, and how to mend "
        "it."
    ),
    "warm": "Compile the kernels for GPUs before a load needs them, such as into an image.",
    "dashboard": "A page for a browser: instances, ranks, who reads from whom.",
    "gateway": "Speak SGLang's HTTP interface, for its seeds and clients.",
    "context": "The contexts of this user: where etcd is, by name.",
    "completion": "What makes a shell complete commands, options and instances.",
    "etcd": "Run an etcd for trying things out.",
    "demo": "Show it all on this machine: register, load, verify, lose a rank.",
}
# what `register` and `load` need and a plain installation lacks
_EXTRAS = (
    "torch",
    "safetensors",
    "numpy",
)
_GATEWAY_EXTRAS = ("starlette", "uvicorn")
log = logging.getLogger(__name__)
_PIPE_CLOSED = 128 + signal.SIGPIPE  # the reader of our output has left, as `head` does
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"engine_cli.commands.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # which click would call a failure
            raise click.exceptions.Exit(_PIPE_CLOSED) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = not args or args[0] in COMMANDS or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], COMMANDS) or f"commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="engine-registry", prog_name="engines")
@options_before_the_command
def engines() -> None:
    """Find the ranks of running inference engines in etcd, and copy their weights from memory to
    memory.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 etcd unreachable or refusing, 4 instance or rank
    missing, incomplete or lost, 5 weights do not match or failed verification, 130 interrupted.
    """


def main(command: click.Command = engines, name: str = "engines") -> NoReturn:
    """Runs the command, with the arguments of this process, and ends the process with its exit
    code.
    """
    # what gRPC's C++ core logs, we report ourselves
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what its encoding lacks is no reason to fail
    logs.begin()
    _leave(int(_run(command, name)))


def _open_closed_streams() -> None:
    """Standard streams that the caller has closed lead nowhere.

    Else the next file or socket would get their descriptors.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the closed one
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def _leave(code: int) -> NoReturn:
    """Ends the process, but not the interpreter: that stops gRPC's and torch's threads where they
    are, and may then wait for ever for a lock that one of them holds.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(command: click.Command, name: str) -> int:
    try:
        result = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else Exit.DONE
    except click.UsageError as exc:
        if logs.as_json():
            _complain("error", exc.format_message(), exc)
        else:
            with suppress(OSError):
                exc.show()
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt) as exc:
        _complain("", "interrupted", exc)
        return Exit.INTERRUPTED
    except Ended as exc:
        _complain("", str(exc), exc)
        return 128 + exc.number
    except BrokenPipeError:
        return _PIPE_CLOSED
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else Exit.FAILED
    except Exception as exc:  # noqa: BLE001  the last stop: what is not one of our errors is reported as a bug
        if debugging() and not logs.as_json():
            traceback.print_exc()
        _complain("error", _in_one_line(exc), exc)
        return code_of(exc) or Exit.FAILED


def _complain(kind: str, text: str, exc: BaseException) -> None:
    """How the command has ended, if not well: the last line that it says."""
    if logs.as_json():
        from engine_registry.telemetry.logs import fields

        log.error("%s", text, exc_info=debugging(), extra=fields("command_failed", error=exc))
        return
    with suppress(OSError):  # a terminal that has been closed
        click.echo(f"engines: {f'{kind}: ' if kind else ''}{printable(text)}", err=True)


def _in_one_line(exc: Exception) -> str:
    text = said(exc)
    if code_of(exc) is not None or isinstance(exc, click.ClickException):
        return text
    if isinstance(exc, ModuleNotFoundError) and exc.name in _EXTRAS:
        return (
            f"{exc.name} is not installed: pip install 'engine-registry[cpu]' (or [cuda12], "
            "[cuda13] on GPU machines)"
        )
    if isinstance(exc, ModuleNotFoundError) and exc.name in _GATEWAY_EXTRAS:
        return f"{exc.name} is not installed: pip install 'engine-registry[gateway]'"
    if isinstance(exc, OSError) and exc.errno in _CANNOT_WRITE:
        return f"cannot write: {exc.strerror}: look where the output goes, and at the disk"
    return f"unexpected {type(exc).__name__}: {text} (--debug shows where; please report it)"
