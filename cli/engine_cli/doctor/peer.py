"""Every rank of an instance, looked at from here: is it registered, does it answer, is it who its
record says, can it be read.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING

from engine_cli.doctor.child import Died, Fact, Late, Probe, RankTask
from engine_cli.doctor.dial import Dialled, dial, mend_of, problem_of
from engine_cli.doctor.engine import IMPORT_S
from engine_cli.doctor.finding import Finding, Status, duration, fail, ok, skipped, warn
from engine_cli.doctor.runner import at_once
from engine_cli.doctor.speed import check_speed
from engine_cli.suggestions import did_you_mean
from engine_registry.errors import InvalidField
from engine_registry.schema.address import host_of, is_loopback, parse_session
from engine_registry.schema.printable import count
from engine_registry.schema.status import why_held

if TYPE_CHECKING:
    from engine_registry.etcd.client import Etcd
    from engine_registry.schema.manifest import Export
    from engine_registry.schema.record import RankRecord
    from engine_registry.schema.status import InstanceStatus

_AT_ONCE = 256
_SLOW_S = 0.1


def check_peer(
    etcd: Etcd,
    probe: Probe,
    instance: str,
    rank: int | None,
    protocol: str,
    device: str,
    limit_s: float,
) -> Iterator[Finding]:
    """`limit_s` is for the ranks' answers, from when our engine is ready, and for a measurement of
    the speed of the first that is well.
    """
    from engine_registry.schema.keys import instance_prefix
    from engine_registry.schema.roster import Roster

    roster = Roster(instance)
    for item in etcd.snapshot(instance_prefix(instance)).items:
        roster.see(item)
    status = roster.status()
    yield judge_instance(status, rank, () if status.records else _instances(etcd))
    records = [record for record in status.records if rank is None or record.rank == rank]
    if not records:
        return
    readable = [record for record in records if record.protocol == protocol and record.header_addr]
    probe.read_ranks([_task(etcd, record) for record in readable])
    lines = _dial_all(records, limit_s)
    headers, engine_error = _headers(
        probe, {record.key for record in readable if _listens(lines[record.key])}, limit_s
    )
    for record in records:
        yield judge_rank(
            record,
            protocol,
            socket.gethostname(),
            lines[record.key],
            headers.get(record.key),
            engine_error,
            limit_s,
        )
    for record in readable:
        header = headers.get(record.key)
        if header and not header["error"]:
            yield from check_speed(etcd, probe, record, header, device, limit_s)
            return


def _task(etcd: Etcd, record: RankRecord) -> RankTask:
    """Over cuda_ipc with the handles of its memory: without them, the read says what is wrong."""
    from engine_registry.errors import RegistryError
    from engine_registry.registration.manifests import fetch_manifest
    from engine_registry.schema.record_format import encode

    exports: Sequence[Export] = ()
    if record.protocol == "cuda_ipc":
        with suppress(RegistryError):
            exports = fetch_manifest(etcd, record).exports
    return RankTask(record.key, encode(record), exports)


def _dial_all(records: Sequence[RankRecord], limit_s: float) -> dict[str, Dialled | None]:
    """Under `limit_s` for each; None where the record has no address that one can dial."""
    lines: dict[str, Dialled | None] = {}
    for start in range(0, len(records), _AT_ONCE):
        some = records[start : start + _AT_ONCE]
        lines |= dict(
            zip(
                [record.key for record in some],
                at_once(lambda record: _dial(record, limit_s), some),
                strict=True,
            )
        )
    return lines


def _dial(record: RankRecord, limit_s: float) -> Dialled | None:
    try:
        return dial(*parse_session(record.session_id), limit_s)
    except InvalidField:
        return None


def _listens(line: Dialled | None) -> bool:
    return line is not None and line.trouble is None


def _headers(probe: Probe, keys: Set[str], limit_s: float) -> tuple[dict[str, Fact], str]:
    """What came of reading the headers of those that listen; and why there is no engine to read
    with, or empty.
    """
    began = time.monotonic()
    for step in ("torch", "library", "engine"):
        try:
            fact = probe.fact(step, max(0.1, began + IMPORT_S - time.monotonic()))
        except (Died, Late) as exc:  # other findings say more
            return {}, f"the transfer engine did not start: {exc}"
        if fact["error"]:
            return {}, fact["error"]
    facts = probe.facts("rank", lambda found: keys <= {fact["key"] for fact in found}, limit_s)
    headers = {fact["key"]: fact for fact in facts}
    if ended := probe.ended():
        crashed: Fact = {"error": f"the process that was to read it {ended}", "crashed": True}
        headers = {key: headers.get(key, crashed) for key in keys}
    return headers, ""


def _instances(etcd: Etcd) -> Sequence[str]:
    """The names of those that this user may see."""
    from engine_registry.errors import EtcdRefused
    from engine_registry.schema.keys import ENGINES
    from engine_registry.schema.roster import assess_all

    try:
        return [status.instance for status in assess_all(etcd.snapshot(ENGINES).items)]
    except EtcdRefused:
        return ()


def judge_instance(status: InstanceStatus, rank: int | None, others: Sequence[str] = ()) -> Finding:
    """`others` are the names of instances that are registered."""
    name = "peer.registered"
    if not status.records and not status.problems:
        held = f": {status.held_summary}" if status.held else ""
        return fail(
            name,
            f"{status.instance} is not registered{held}",
            f"start its ranks again: see engines show {status.instance}"
            if held
            else did_you_mean(status.instance, others)
            or "see engines list; is it in another --namespace?",
        )
    if rank is not None and all(record.rank != rank for record in status.records):
        held = "".join(f": it is {why_held(one)}" for one in status.held if one.rank == rank)
        return fail(
            name,
            f"rank {rank} of {status.instance} is not registered{held}",
            f"see engines show {status.instance}, and that rank's log",
        )
    if status.missing:
        return fail(
            name,
            f"{status.instance}: {status.why}",
            "start the missing ranks, or look at their logs",
        )
    if status.problems:
        return warn(
            name, f"{status.instance}: {status.summary}", f"see engines show {status.instance}"
        )
    return ok(
        name,
        f"{status.instance}: all of {count(status.world_size, 'rank')}, version {status.version}",
    )


def judge_rank(
    record: RankRecord,
    protocol: str,
    here: str,
    line: Dialled | None,
    header: Fact | None,
    engine_error: str,
    limit_s: float,
) -> Finding:
    """`here` is this machine's name, `line` what came of a connection, `header` of reading its
    header.
    """
    name, who = "peer.rank", f"{record.instance}/{record.rank} at {record.session_id}"
    process = f"process {record.pid or 'of the seed'} on {record.host or '?'}"
    if is_loopback(host_of(record.session_id)) and record.host != here:
        return fail(
            name,
            f"{who}: a loopback address, registered on {record.host}",
            f"register it with --host and an address of {record.host} that others reach",
        )
    if line is None:
        return fail(
            name,
            f"{who}: that is no host:port",
            "engines evict it, and register it again with --host",
        )
    if line.trouble is not None:
        return fail(name, f"{who}: {problem_of(line)}", mend_of(line, process))
    if record.protocol != protocol:
        return warn(
            name,
            f"{who} listens, but serves over {record.protocol}, not {protocol}",
            f"engines doctor --protocol {record.protocol}, and load so",
        )
    if not record.header_addr:
        return skipped(
            name,
            f"{who} listens ({duration(line.seconds)}); it has no header to read, as an "
            "SGLang seed has none",
        )
    if engine_error:
        return skipped(
            name,
            f"{who} listens ({duration(line.seconds)}); its header was not read: {engine_error}",
        )
    return _judge_header(record, who, process, header, limit_s)


def _judge_header(
    record: RankRecord, who: str, process: str, header: Fact | None, limit_s: float
) -> Finding:
    name = "peer.rank"
    if header is None:
        return fail(
            name,
            f"{who} takes connections, but its memory is not read within {duration(limit_s)}",
            f"{process} is stopped or hangs (ps -o stat,wchan -p {record.pid} there), or a "
            "firewall passes only some ports",
        )
    if header["error"]:
        mend = header.get("mend") or (
            f"look at {process}; is a firewall in the way? Peers need all unprivileged ports"
        )
        if header.get("lost"):
            mend = "it leaves etcd by itself when its lease ends; else engines evict it"
        elif header.get("crashed"):
            mend = "engines doctor --debug shows the transfer engine's own log; please report it"
        return fail(name, f"{who}: {header['error']}", mend)
    timing = (
        f"header read in {duration(header['read_s'])} (first contact "
        f"{duration(header['contact_s'])})"
    )
    if header.get("way"):
        timing += f", {header['way']}"
    if header["updating"] or header["version"] != record.version:
        state = (
            f"version {header['version']}{', being changed' if header['updating'] else ''}, the "
            f"record says {record.version}"
        )
        return warn(
            name,
            f"{who}: {timing}; its weights are of {state}",
            "run this again: an update may be under way",
        )
    slow = header["read_s"] > _SLOW_S
    what = f"{who}: {timing}; it is who its record says, version {header['version']}"
    return Finding(
        name,
        Status.WARN if slow else Status.OK,
        what,
        "the network between here and there is slow: ping, mtr" if slow else "",
    )
