"""Torch, its devices and the transfer engine: tried in the probe process, judged here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine_cli.doctor.child import Died, Fact, Late, Probe
from engine_cli.doctor.finding import Finding, Status, fail, ok, skipped, warn
from engine_cli.doctor.python import INSTALL
from engine_cli.doctor.runner import Skip
from engine_cli.render.tables import size
from engine_registry.schema.record import WITHIN_HOST

IMPORT_S = 30.0  # a cold disk makes torch's import slow, and that is no fault
ENGINE_S = 10.0  # with many network cards an engine takes its time to start
_DRIVER = Path("/proc/driver/nvidia/version")
_SLOW_BYTES_S = 100e6


def check_torch(probe: Probe, protocol: str, wanted: bool) -> Iterator[Finding]:
    fact = _fact(probe, "torch", IMPORT_S)
    yield judge_torch(fact, wanted)
    if not fact["error"]:
        yield from judge_devices(fact, _DRIVER.exists(), protocol)


def check_engine(probe: Probe, protocol: str, wanted: bool) -> Iterator[Finding]:
    """`wanted`: the user asks for transfers, so an engine that is not there is a failure."""
    if _fact(probe, "torch", IMPORT_S)["error"]:
        raise Skip("needs torch: see engine.torch")
    fact = _fact(probe, "library", IMPORT_S)
    if protocol == "cuda_ipc":
        yield judge_kernels(fact)
    elif protocol == "socket" and not fact["error"]:
        yield skipped("engine.import", "socket needs no library")
    else:
        yield judge_mooncake(fact, protocol, wanted)
    if fact["error"]:
        return
    started = _fact(probe, "engine", ENGINE_S)
    if started["error"]:
        yield fail(
            "engine.loopback",
            started["error"],
            started["mend"] or "engines doctor --debug shows the transfer engine's own log",
        )
        return
    yield judge_loopback(_fact(probe, "loopback", ENGINE_S), protocol)


def _fact(probe: Probe, name: str, limit_s: float) -> Fact:
    """What went wrong with the process is what went wrong with this."""
    try:
        return probe.fact(name, limit_s)
    except Died as exc:
        return {
            "fact": name,
            "error": (
                f"the process that tried it {exc}: the installation is broken, or there is no "
                "memory"
            ),
            "mend": "",
        }
    except Late as exc:
        return {"fact": name, "error": str(exc), "mend": ""}


def judge_torch(fact: Fact, wanted: bool) -> Finding:
    name = "engine.torch"
    if fact.get("missing"):
        return Finding(
            name,
            Status.FAIL if wanted else Status.WARN,
            "torch is not installed: register and load do not work",
            INSTALL,
        )
    if fact["error"]:
        return fail(name, f"torch cannot be imported: {fact['error']}", f"reinstall it: {INSTALL}")
    kind = f"built for {fact['built_for']}" if fact["built_for"] else "for CPU"
    return ok(name, f"torch {fact['version']}, {kind}")


def judge_devices(fact: Fact, driver: bool, protocol: str) -> list[Finding]:
    """`driver`: the kernel has NVIDIA's."""
    name, devices = "cuda.devices", fact["devices"]
    bad = Status.FAIL if protocol in WITHIN_HOST else Status.WARN
    if not fact["built_for"]:
        if driver:
            return [
                Finding(
                    name,
                    bad,
                    "this machine has NVIDIA's driver, but this torch is built for CPU",
                    "pip install 'engine-registry[cuda12]' (or [cuda13]) instead of [cpu]",
                )
            ]
        if protocol in WITHIN_HOST:
            return [
                fail(
                    name,
                    f"no GPU and no torch for one: {protocol} cannot work",
                    "say --protocol tcp or rdma",
                )
            ]
        return [skipped(name, "this torch is built for CPU, and no NVIDIA driver is here")]
    if not devices:
        return [
            Finding(
                name,
                bad,
                f"torch is built for {fact['built_for']}, but sees no GPU",
                "nvidia-smi; CUDA_VISIBLE_DEVICES; in a container: --gpus all",
            )
        ]
    kinds = ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices))
    return [ok(name, kinds), judge_peer_access(len(devices), fact["no_access"], protocol)]


def judge_peer_access(count: int, no_access: list[list[int]], protocol: str) -> Finding:
    name = "cuda.p2p"
    if count < 2:
        return skipped(name, "one GPU has no peer")
    if not no_access:
        return ok(name, f"each of {count} GPUs reaches the memory of each other")
    pairs = ", ".join(f"{a}→{b}" for a, b in no_access[:6]) + (", …" if len(no_access) > 6 else "")
    bad = Status.FAIL if protocol in WITHIN_HOST else Status.WARN
    return Finding(
        name,
        bad,
        f"no access between GPUs {pairs}",
        "nvidia-smi topo -p2p r; with PCIe alone: turn off ACS; or do not use "
        + " and ".join(WITHIN_HOST),
    )


def judge_mooncake(fact: Fact, protocol: str, wanted: bool) -> Finding:
    name = "engine.import"
    if fact["error"]:
        what, mend = fact["error"], fact["mend"]
        missing = "is not installed" in what and not wanted
        return Finding(
            name, Status.WARN if missing else Status.FAIL, what, mend or f"reinstall it: {INSTALL}"
        )
    ways = fact["transports"]
    needed = {"tcp": "Tcp", "rdma": "Rdma", "nvlink_intra": "IntraNodeNvlink"}[protocol]
    said = f"the transfer engine can be imported; built with {', '.join(ways) or 'unknown ways'}"
    if ways and needed.lower() not in "".join(ways).lower():
        return fail(
            name,
            f"{said}: {protocol} is not among them",
            "install the extra for this machine: [cuda12] or [cuda13] for GPUs",
        )
    return ok(name, said)


def judge_kernels(fact: Fact) -> Finding:
    name = "engine.import"
    if fact["error"]:
        missing = "No module named 'triton'" in fact["error"]
        why = "is not installed" if missing else f"cannot be imported: {fact['error']}"
        return fail(
            name,
            f"the kernels of cuda_ipc are not compiled, and triton {why}",
            "pip install triton, of the version that this torch requires, or say --protocol "
            "nvlink_intra",
        )
    kinds, folder = ", ".join(f"sm_{arch}" for arch in fact["archs"]), fact["folder"]
    if "triton" not in fact:
        return ok(name, f"the kernels for {kinds} are in {folder}: no Triton is needed")
    said = f"triton {fact['triton']} can be imported"
    if not kinds:
        return ok(name, said)
    if not fact["can_be_kept"]:
        return warn(
            name,
            f"{said}, but each process compiles the kernels for {kinds}: {folder} cannot be "
            "written",
            "make it writable, or name another folder in XDG_CACHE_HOME; then run engines warm",
        )
    return ok(
        name,
        f"{said}, and compiles the kernels for {kinds} in the first load, into {folder}: engines "
        "warm does so before",
    )


def judge_loopback(fact: Fact, protocol: str) -> Finding:
    name = "engine.loopback"
    if fact["error"]:
        what, mend = fact["error"], fact["mend"]
        return fail(
            name,
            f"a transfer on this machine over {protocol} fails: {what}",
            mend
            or (
                "a firewall? iptables -S INPUT; engines doctor --debug shows the transfer "
                "engine's own log"
            ),
        )
    if fact.get("skipped"):
        return skipped(name, f"{fact['skipped']}: use --peer with an instance on this machine")
    speed = fact["nbytes"] / fact["seconds"]
    what = f"{size(fact['nbytes'])} read over {protocol} on this machine at {size(speed)}/s"
    if not fact["equal"]:
        return fail(
            name,
            f"{what}, but not as they were",
            "do not load here: the memory, the network card or the transfer engine is faulty",
        )
    if speed < _SLOW_BYTES_S:
        return warn(
            name,
            f"{what}: slow",
            "is the machine busy? top; is the CPU throttled or limited by a cgroup?",
        )
    return ok(name, what)
