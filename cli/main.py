"""The entry point: finds the command, and turns every error into one line on stderr and a documented exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback

import click

from cli.exits import Exit, code_of
from cli.options import debugging

# In the order of `engines --help`. A command's module is imported only when it is asked for, so that help is quick.
COMMANDS = {
    "register": "Serve safetensors files from memory as one rank of an instance.",
    "list": "All instances: state, ranks, model, version, size.",
    "show": "One instance: its ranks, and on request their tensors.",
    "watch": "Ranks and instances as they come and go.",
    "load": "Copy a rank's weights from a running instance.",
    "evict": "Take ranks out of the registry.",
    "etcd": "Run an etcd for trying things out.",
    "bench": "Measure this machine: loading, and the control plane.",
    "demo": "Show it all on this machine: register, load, verify, lose a rank.",
}


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="engine-registry", prog_name="engines")
def engines() -> None:
    """Find the ranks of running inference engines in etcd, and copy their weights from memory to memory.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 etcd unreachable or refusing, 4 instance or rank missing, incomplete or
    lost, 5 weights do not match or failed verification, 130 interrupted.
    """


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC's C++ core logs, we report ourselves
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.ERROR, "error")
    logging.basicConfig(format="engines: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    sys.exit(int(_run()))


def _run() -> int:
    try:
        result = engines.main(prog_name="engines", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else Exit.DONE
    except click.UsageError as exc:
        exc.show()
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("engines: interrupted", err=True)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except Exception as exc:  # noqa: BLE001  the last stop: what is not one of our errors is reported as a bug
        if debugging():
            traceback.print_exc()
        click.echo(f"engines: error: {_in_one_line(exc)}", err=True)
        return code_of(exc) or Exit.FAILED


def _in_one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    if code_of(exc) is not None or isinstance(exc, click.ClickException):
        return text
    return f"unexpected {type(exc).__name__}: {text} (--debug shows where; please report it)"
