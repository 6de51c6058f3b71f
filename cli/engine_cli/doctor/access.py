"""Who we are to etcd, and what that user may do there. Passwords are never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_cli.doctor.finding import Finding, fail, ok, warn

if TYPE_CHECKING:
    from engine_registry.errors import EtcdError
    from engine_registry.etcd.admin import User

# Jobs, and the prefixes that each reads and writes (docs/reference/etcd-keys.md).
JOBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list and watch": (("/engines/",), ()),
    "load": (("/engines/", "/manifests/", "/pulls/"), ("/pulls/",)),
    "serve a rank": (("/engines/", "/pulls/", "/evicted/"), ("/engines/", "/manifests/")),
    "evict": (("/engines/", "/evicted/"), ("/engines/", "/manifests/", "/evicted/")),
    "clean up": (
        ("/engines/", "/evicted/", "/elections/", "/eviction-notes/"),
        ("/engines/", "/manifests/", "/evicted/", "/elections/", "/eviction-notes/"),
    ),
}

# The index by model: these jobs are done without it, but loads by model read all records then.
_INDEX = "/holders/"
_INDEXED = {"load": "read", "serve a rank": "write"}


def judge_login(
    name_given: str | None, error: EtcdError | None, loopback: bool, by_certificate: bool
) -> Finding:
    """`error` is what a first read ended with."""
    name = "etcd.auth"
    reason = error.details.get("reason") if error is not None else None
    if reason == "credentials" and name_given is None:
        return fail(
            name,
            "etcd has authentication on, and no user was given",
            "give --user, and the password in ENGINES_ETCD_PASSWORD",
        )
    if reason == "credentials":
        return fail(
            name,
            f"etcd refuses the user {name_given!r} or the password",
            "check --user and ENGINES_ETCD_PASSWORD; as root: etcdctl user get NAME, etcdctl "
            "user passwd NAME",
        )
    if reason == "auth_off":
        return fail(
            name,
            f"etcd has authentication off, and refuses the login of {name_given!r}",
            "leave out --user, or turn it on: etcdctl auth enable",
        )
    if name_given is not None:
        return ok(name, f"logged in as {name_given!r}")
    if reason == "denied" or by_certificate:
        return ok(
            name,
            "no user given; etcd takes who we are from the client certificate, if it asks at all",
        )
    if loopback:
        return ok(name, "off, and etcd is on this machine")
    return warn(
        name,
        "off: any client that reaches etcd decides where loaders read weights from",
        "turn on users and roles: docs/how-to/secure-etcd.md says what each needs",
    )


def judge_permissions(user: User, namespace: str) -> Finding:
    name = "etcd.permissions"
    who = f"{user.name!r} (roles: {', '.join(user.roles) or 'none'})"
    if "root" in user.roles:
        return warn(
            name,
            f"{who} may do everything",
            "create a user for engines that may do only what they need",
        )
    jobs = [
        f"{job}{extent}"
        for job, (reads, writes) in JOBS.items()
        if (extent := _extent(user, namespace, reads, writes)) is not None
    ]
    prefixes = sorted(
        {prefix for reads, writes in JOBS.values() for prefix in (*reads, *writes)} | {_INDEX}
    )
    summary = "; ".join(
        f"{verb} {', '.join(places)}"
        for verb, places in (
            ("reads", _places(user, namespace, prefixes, False)),
            ("writes", _places(user, namespace, prefixes, True)),
        )
        if places
    )
    if not _places(user, namespace, ["/engines/"], False):
        what = f"{who} may not read {namespace}/engines/, which every command needs" + (
            f": {summary}" if summary else ""
        )
        return fail(
            name,
            what,
            f"etcdctl role grant-permission ROLE read --prefix=true {namespace}/engines/",
        )
    what = f"{who} may {', '.join(jobs) or 'do no job'}: {summary}"
    for job, verb in _INDEXED.items():
        can = any(each.startswith(job) for each in jobs)
        if can and not _places(user, namespace, [_INDEX], verb == "write"):
            return warn(
                name,
                f"{what}; it may not {verb} {namespace}{_INDEX}, "
                "so loads by model read all records",
                f"etcdctl role grant-permission ROLE {verb} --prefix=true {namespace}{_INDEX}",
            )
    return ok(name, what)


def _extent(
    user: User, namespace: str, reads: tuple[str, ...], writes: tuple[str, ...]
) -> str | None:
    """Empty where the user may do all of a job, None where nothing of it."""
    from engine_registry.etcd.admin import Reach

    reaches = {
        user.reach(*_range(namespace + prefix), write=write)
        for places, write in ((reads, False), (writes, True))
        for prefix in places
    }
    if Reach.NONE in reaches:
        return None
    return " (some instances)" if Reach.PART in reaches else ""


def _places(user: User, namespace: str, prefixes: list[str], write: bool) -> list[str]:
    from engine_registry.etcd.admin import Reach

    reaches = [
        (prefix, user.reach(*_range(namespace + prefix), write=write)) for prefix in prefixes
    ]
    return [
        prefix if reach is Reach.ALL else f"parts of {prefix}"
        for prefix, reach in reaches
        if reach is not Reach.NONE
    ]


def _range(prefix: str) -> tuple[bytes, bytes]:
    start = prefix.encode()
    return start, start[:-1] + bytes([start[-1] + 1])  # all of ours end in a slash
