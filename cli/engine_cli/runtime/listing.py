"""How `engines list --watch` goes on: a table that is drawn again and again on a terminal, and
elsewhere a line for each change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import click

from engine_cli.render import live
from engine_cli.render.documents import listed_json
from engine_cli.render.flows import Flows
from engine_cli.render.listing import Changes, Choice, none_text
from engine_cli.render.states import any_loads
from engine_cli.render.tables import RowPrinter, print_json
from engine_cli.render.texts import instance_table
from engine_cli.render.views import ListView
from engine_cli.signals import stop_on_ending
from engine_registry import AllInstances, InstanceStatus, Registry
from engine_registry.errors import EtcdRefused, EtcdUnavailable


def keep_listing(registry: Registry, choice: Choice, as_json: bool) -> None:
    """Until a signal, or until the terminal is closed."""
    with ExitStack() as stack:
        instances = stack.enter_context(registry.follow_instances())
        if as_json or not live.fits():
            stop_on_ending(instances.stop)
            _print_changes(instances, registry, choice, as_json)
            return
        view = ListView(choice)
        screen = live.Screen(instances, stack.enter_context(registry.follow_pulls()), view)
        stop_on_ending(instances.stop, screen.restore)
        listed = iter(instances)
        view.see(next(listed, ()))
        stack.enter_context(screen)
        for statuses in listed:
            with screen.changing():
                view.see(statuses)


def _print_changes(
    instances: AllInstances, registry: Registry, choice: Choice, as_json: bool
) -> None:
    """A line for each instance of the choice, and again for each that changes or leaves it."""
    changes, printer = Changes(choice), RowPrinter()
    for statuses in instances:
        changed = changes.since(statuses)
        flows = flows_of(registry, changed)
        if as_json:
            for status in changed:
                print_json(listed_json(status, flows))
        elif changed:
            printer.print(*instance_table([(each, flows.loaded(each)) for each in changed]))
        elif not printer.columns:
            click.echo(none_text(len(statuses)))


def flows_of(registry: Registry, statuses: Sequence[InstanceStatus]) -> Flows:
    """Asks for tickets only where there is a rank whose progress they state.

    Where they are not to be had, the rest is shown.
    """
    records = [record for status in statuses for record in status.records]
    try:
        return Flows(records, registry.all_pulls() if any_loads(records) else ())
    except (EtcdRefused, EtcdUnavailable):
        return Flows(records, ())
