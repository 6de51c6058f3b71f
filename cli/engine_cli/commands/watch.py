"""`engines watch`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import Seconds, json_option, selector_option
from engine_cli.render import live
from engine_cli.render.documents import event_json
from engine_cli.render.tables import print_json
from engine_cli.render.texts import event_text
from engine_cli.render.views import BoardView
from engine_cli.runtime.hooks import Hooks
from engine_cli.runtime.kept import KeptEvents
from engine_cli.runtime.metrics import metrics_options
from engine_cli.runtime.waiting import say_if_not_there
from engine_cli.signals import stop_on_ending
from engine_registry import CleaningWatch, Watch
from engine_registry.schema.moment import utc
from engine_registry.watching.metrics import WatchMetrics


@click.command("watch")
@click.argument("instance", required=False, shell_complete=complete_instances)
@selector_option
@click.option(
    "--exec",
    "hook",
    metavar="CMD",
    help="Run CMD with sh for every event: JSON on stdin, ENGINES_… in its environment.",
)
@click.option(
    "--exec-timeout",
    type=Seconds(),
    default=60.0,
    show_default=True,
    metavar="S",
    help="End a CMD after this.",
)
@click.option(
    "--cleanup",
    is_flag=True,
    help="Evict what is left of an instance that lost a rank and stays degraded.",
)
@click.option(
    "--grace",
    type=Seconds(),
    default=30.0,
    show_default=True,
    metavar="S",
    help="How long --cleanup waits.",
)
@click.option("--dry-run", is_flag=True, help="With --cleanup: only say what would be evicted.")
@click.option(
    "--lines",
    is_flag=True,
    help="One line an event, also on a terminal; as in a pipe, or with --exec.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also append each event to FILE, for `engines events`; it and FILE.1 take 32 MiB at most.",
)
@json_option
@metrics_options
@log_options
@etcd_options
def command(
    connect: Connect,
    serve_metrics: Callable[[], AbstractContextManager[None]],
    instance: str | None,
    selector: str,
    hook: str | None,
    exec_timeout: float,
    cleanup: bool,
    grace: float,
    dry_run: bool,
    lines: bool,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Ranks and instances as they come and go, beginning with what is there now. On a terminal it
    is a table, with who reads from whom and how far each load is. Ends with Ctrl-C or SIGTERM,
    after the CMD that runs then has ended or 5 s are over; a second signal does not wait.

    An etcd that is away is waited for; what changed meanwhile is shown when it is back. Any number
    of watches may run with
    --cleanup: one of them evicts.
    """
    if dry_run and not cleanup:
        raise click.UsageError("--dry-run goes with --cleanup")
    if cleanup and selector:
        raise click.UsageError(
            "--label and --cleanup exclude each other: name one INSTANCE, or clean up all"
        )
    with ExitStack() as stack:
        stack.enter_context(serve_metrics())
        registry = stack.enter_context(connect())
        if instance is not None:
            say_if_not_there(registry, instance)
        hooks = stack.enter_context(Hooks(hook, exec_timeout)) if hook else None
        kept = stack.enter_context(KeptEvents(keep)) if keep else None
        watch: Watch | CleaningWatch = (
            registry.cleaning_watch(instance, grace_s=grace, dry_run=dry_run)
            if cleanup
            else registry.watch(instance, selector=selector)
        )
        stack.enter_context(watch)
        screen, view = None, BoardView(narrowed=bool(instance or selector))
        if not (lines or as_json or hooks) and live.fits():
            screen = live.Screen(watch, stack.enter_context(registry.follow_pulls()), view)
        stop_on_ending(lambda: _stop(watch, hooks), lambda: _end_at_once(hooks, screen))
        if screen:
            stack.enter_context(screen)
        counted = WatchMetrics()
        if kept:
            kept.put({"at": utc(), "event": "watch_began", "text": "a watch began"})
        for event in watch:
            counted.see(event)
            at = utc()
            # it names each rank of an instance, so it is made only where it is wanted
            data = {"at": at, **event_json(event)} if kept or as_json or hooks else {}
            if kept:
                kept.put({**data, "text": event_text(event)})
            if screen:
                with screen.changing():
                    view.see(event, at)
            elif as_json:
                print_json(data)
            else:
                click.echo(f"{at}  {event_text(event)}")
            if hooks:
                hooks.run(data)


def _stop(watch: Watch | CleaningWatch, hooks: Hooks | None) -> None:
    watch.stop()
    if hooks:
        hooks.stop()


def _end_at_once(hooks: Hooks | None, screen: live.Screen | None) -> None:
    if hooks:
        hooks.kill()
        hooks.report()
    if screen:
        screen.restore()
