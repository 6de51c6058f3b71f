"""`engines completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from engine_cli.options import debug_option

_VARIABLE = "_ENGINES_COMPLETE"  # click's, for a program of this name


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and instances.

    \b
        eval "$(engines completion bash)"              in ~/.bashrc
        eval "$(engines completion zsh)"               in ~/.zshrc
        engines completion fish | source               in ~/.config/fish/config.fish
    """
    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"this version of click completes nothing in {shell}")
    root = ctx.find_root()
    click.echo(completion(root.command, {}, "engines", _VARIABLE).source())
