"""`engines warm`."""

from __future__ import annotations

import re
from contextlib import nullcontext

import click
from rich.console import Console

from engine_cli.options import debug_option, json_option
from engine_cli.render.tables import print_json, print_table
from engine_cli.signals import held_back, raised

_KIND = re.compile(r"(\d{1,2})\.(\d)|(?:sm_)?(\d{2,3})")


def _archs_of(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[int, ...]:
    """Each once: 90 for sm_90."""
    return tuple(dict.fromkeys(map(_arch_of, values)))


def _arch_of(text: str) -> int:
    found = _KIND.fullmatch(text.strip().lower())
    if found is None:
        raise click.BadParameter(
            f"{text!r} is no kind of GPU: give its compute capability, as 9.0, 90 or sm_90."
        )
    major, minor, both = found.groups()
    return int(both or major + minor)


@click.command("warm")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="KIND",
    callback=_archs_of,
    help="A kind of GPU, by its compute capability: 9.0, 90 or sm_90. May be given several times. "
    "Default: the GPUs of this machine.",
)
@json_option
@debug_option
def command(archs: tuple[int, ...], as_json: bool) -> None:
    """Compile the kernels for GPUs, so that the first load need not.

    They copy over cuda_ipc, and compute digests. Their files are in
    ~/.cache/engine-registry/kernels, or below XDG_CACHE_HOME. Loads that find them need no Triton.

    With --arch no GPU is needed: compile them when you build an image. Compiling needs Triton, and
    no C compiler.
    """
    with held_back():
        from engine_loader.kernels.kept import folder
        from engine_loader.warming import archs_here, warm
    archs = archs or tuple(archs_here())
    if not archs:
        raise click.UsageError(
            "no GPU of CUDA is here: name the kind that you compile for, as in --arch 9.0"
        )
    console = Console(stderr=True)
    with raised(), console.status("compiling …") if console.is_terminal else nullcontext():
        warmed = list(warm(archs))
    if as_json:
        print_json(
            {
                "folder": str(folder()),
                "kernels": [
                    {
                        "kernel": each.kernel,
                        "gpu": f"sm_{each.arch}",
                        "compiled": each.compiled,
                        "file": str(each.path),
                    }
                    for each in warmed
                ],
            }
        )
    else:
        print_table(
            ("KERNEL", "GPU", "WHAT", "FILE"),
            [
                (
                    each.kernel,
                    f"sm_{each.arch}",
                    "compiled" if each.compiled else "already there",
                    str(each.path),
                )
                for each in warmed
            ],
        )
