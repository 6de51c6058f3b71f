"""`engines context`."""

from __future__ import annotations

import os

import click

from engine_cli.connection import CONTEXT_VARIABLE
from engine_cli.contexts import Contexts
from engine_cli.options import debug_option, json_option
from engine_cli.render.tables import print_json, print_table


@click.group("context")
@debug_option
def command() -> None:
    """Contexts: where etcd is, by name.

    They are tables of the file engines/config.toml in ~/.config:

    \b
        current = "prod"
        [contexts.prod]
        etcd = "https://10.0.0.5:2379"
        namespace = "prod"
        cacert = "ca.pem"

    A context has any of etcd, namespace, cacert, cert, key, user and timeout. Options and variables
    of the environment go before it. ENGINES_CONFIG names another file.
    """


@command.command("list")
@json_option
@debug_option
def list_contexts(as_json: bool) -> None:
    """All contexts; the current one has a star."""
    contexts = Contexts.load(os.environ)
    chosen = os.environ.get(CONTEXT_VARIABLE) or contexts.current
    found = {name: contexts.settings(name) for name in sorted(contexts.contexts)}
    if as_json:
        print_json(
            {
                "file": str(contexts.path),
                "current": chosen or None,
                "contexts": [{"name": name, **settings} for name, settings in found.items()],
            }
        )
    elif found:
        print_table(
            ("", "NAME", "ETCD", "NAMESPACE", "USER"),
            [
                [
                    "*" if name == chosen else "",
                    name,
                    *[str(settings.get(key, "-")) for key in ("etcd", "namespace", "user")],
                ]
                for name, settings in found.items()
            ],
        )
    else:
        click.echo(f"there is no context: {contexts.path} has none")
