"""`engines doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import click
from rich.console import Console

from engine_cli.completion import complete_instances
from engine_cli.connection import etcd_settings
from engine_cli.devices import check_device, device_option
from engine_cli.doctor.finding import Finding, Status
from engine_cli.exits import Exit
from engine_cli.options import debugging, json_option, rank_option
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json, print_table
from engine_cli.signals import raised

# registry's, which must not be imported here: that it can be is looked at
PROTOCOLS = (
    "tcp",
    "socket",
    "rdma",
    "nvlink_intra",
    "cuda_ipc",
)


@click.command("doctor")
@click.option(
    "--peer",
    metavar="INSTANCE",
    shell_complete=complete_instances,
    help="Also look at every rank of this instance, and read from it.",
)
@rank_option(required=False, help="With --peer: this rank only.")
@click.option("--host", help="Address of this machine. Default: the one that etcd sees.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="tcp",
    show_default=True,
    help="How to read.",
)
@device_option
@json_option
@etcd_settings
@click.pass_context
def command(
    ctx: click.Context,
    etcd: dict[str, Any],
    peer: str | None,
    rank: int | None,
    host: str | None,
    protocol: str,
    device: str,
    as_json: bool,
) -> int:
    """Look for what would keep ranks from being registered, found or read here: etcd, this machine,
    the transfer engine, and with
    --peer the ranks of an instance.

    Each finding is ok, warn, fail or skipped; under a warning or failure stands what mends it. The
    exit code is 1 if anything failed. All checks run at the same time and for a limited time,
    whatever hangs. Nothing is left in etcd.
    """
    from engine_cli.doctor.examination import Asked, examine

    if rank is not None and peer is None:
        raise click.UsageError("--rank goes with --peer: it is that instance's rank")
    check_device(device, protocol)
    given = {
        name
        for name in ("timeout", "protocol")
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    asked = Asked(
        etcd=etcd,
        limit_s=etcd["timeout"] if "timeout" in given else None,
        peer=peer,
        rank=rank,
        host=host,
        protocol=protocol,
        device=device,
        transfers=peer is not None or "protocol" in given,
        debug=debugging(),
    )
    console = Console(stderr=True)
    with raised(), console.status("looking …") if console.is_terminal else nullcontext():
        findings = examine(asked)
    failed = any(finding.status is Status.FAIL for finding in findings)
    if as_json:
        print_json({"ok": not failed, "checks": [finding.to_json() for finding in findings]})
    else:
        print_table(
            ("STATUS", "CHECK", "WHAT"),
            [row for finding in findings for row in _rows(finding)],
        )
        click.echo(printable(summary(findings)))
    return Exit.FAILED if failed else Exit.DONE


def _rows(finding: Finding) -> list[tuple[str, str, str]]:
    rows = [(finding.status.value, finding.check, finding.what)]
    return [*rows, ("", "", f"→ {finding.mend}")] if finding.mend else rows


def summary(findings: Sequence[Finding]) -> str:
    """Which checks are to be looked at, the worst first."""
    parts = []
    for status, word in ((Status.FAIL, "failed"), (Status.WARN, "to look at")):
        checks = list(
            dict.fromkeys(finding.check for finding in findings if finding.status is status)
        )
        if checks:
            parts.append(f"{word}: {', '.join(checks)}")
    return "; ".join(parts) if parts else "all is well"
