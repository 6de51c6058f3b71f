"""A join, as ranks of other models, instances of the same model, and joiners grow in number."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.scale.counts import exponent
from benchmarks.scale.figures import Cell, Found, Say, Table
from benchmarks.scale.joiners import Joins, a_source, join, manifest_of
from benchmarks.scale.ranks import HOST_RANKS, MODEL, Fleet, an_etcd, connected
from benchmarks.scale.sizes import Sizes

_COLUMNS = (
    "requests a join",
    "kB a join",
    "etcd CPU ms a join",
    "client CPU ms a join",
    "watch answers",
    "most readers",
    "exact",
)

_LONG_S = 300.0  # of joins at once: four times as many would take sixteen times as long


def among_ranks(sizes: Sizes, say: Say) -> Found:
    """One joiner and one source, among ranks of another model."""
    joined = []
    with an_etcd() as server, a_source(server), connected(server) as etcd:
        fleet = Fleet(etcd, "other", HOST_RANKS)
        for ranks in sizes.ranks:
            say(f"a join among {ranks:,} ranks of other models")
            fleet.grow_to(ranks)
            joined.append(join(server, 1))
    return _found("R", "ranks of other models", sizes.ranks, joined)


def among_instances(sizes: Sizes, say: Say) -> Found:
    """One joiner, which ends before its first byte: the instances are records without memory."""
    joined = []
    with an_etcd() as server, connected(server) as etcd:
        manifest = manifest_of()
        fleet = Fleet(etcd, "source", 1, model=MODEL, protocol="in_process", manifest=manifest)
        for instances in sizes.instances:
            say(f"a join among {instances:,} complete instances of its model")
            fleet.grow_to(instances)
            joined.append(join(server, 1, complete=False))
    return _found("I", "complete instances of the model", sizes.instances, joined)


def at_once(sizes: Sizes, say: Say) -> Found:
    """One source, and all joiners begin together."""
    joined: list[Joins] = []
    for joiners in sizes.joiners:
        if joined and joined[-1].seconds > _LONG_S:
            say(f"not {joiners:,} joins at once: {joined[-1].joiners:,} took too long")
            break
        say(f"{joiners:,} joins at once")
        with an_etcd() as server, a_source(server):
            joined.append(join(server, joiners, complete=joiners <= sizes.complete))
    return _found("N", "joins at once", sizes.joiners[: len(joined)], joined)


def _found(name: str, title: str, sizes: Sequence[int], joined: Sequence[Joins]) -> Found:
    """`name` is what the size is called in goals."""
    in_all = {
        "requests": [float(each.spent.requests) for each in joined],
        "bytes": [float(each.spent.sent_nbytes) for each in joined],
        "etcd CPU": [each.spent.cpu_s for each in joined],
    }
    fits = {what: exponent(sizes, values) for what, values in in_all.items()}
    last = exponent(sizes[-2:], in_all["bytes"][-2:])
    note = ", ".join(f"{what} {value:.2f}" for what, value in fits.items())
    table = Table(
        f"{name}: {title}",
        (name, *_COLUMNS),
        [(size, *_cells(each)) for size, each in zip(sizes, joined, strict=True)],
        f"exponents in {name}, of all joins together: {note}; bytes of the last two {last:.2f}. "
        "CPU comes in steps of 10 ms.",
    )
    return Found(
        [table],
        {
            f"join_requests_over_{name}": max(each.requests_each for each in joined),
            f"join_kb_over_{name}": max(each.kb_each for each in joined),
            f"join_bytes_exponent_in_{name}": fits["bytes"],
            f"join_client_cpu_s_over_{name}": joined[-1].cpu_s / joined[-1].joiners,
        },
    )


def _cells(each: Joins) -> tuple[Cell, ...]:
    return (
        each.requests_each,
        each.kb_each,
        each.spent.cpu_s / each.joiners * 1e3,
        each.cpu_s / each.joiners * 1e3,
        each.spent.watch_answers,
        each.most_readers,
        f"{each.exact} of {each.joiners}" if each.after else "not read",
    )
