"""What `engines doctor` makes of what this machine, its engine and the ranks of an instance show:
facts in, findings out.
"""

from __future__ import annotations

import resource
import socket
from typing import Any

import pytest

from engine_cli.doctor.dial import Dialled, Trouble
from engine_cli.doctor.engine import (
    judge_devices,
    judge_kernels,
    judge_loopback,
    judge_mooncake,
    judge_torch,
)
from engine_cli.doctor.finding import Finding, Status, described
from engine_cli.doctor.network import (
    check_address,
    judge_address,
    judge_files,
    judge_hostname,
    judge_port,
)
from engine_cli.doctor.peer import judge_instance, judge_rank
from engine_cli.doctor.python import (
    WHEELS,
    judge_etcd3,
    judge_packages,
    judge_version,
    judge_wheels,
)
from engine_loader.engines.mooncake.binding import _what_to_install
from engine_loader.errors import EngineUnavailable
from engine_registry.schema.record import WITHIN_HOST, RankState
from tests.support.assessment import assess
from tests.support.builders import a_record

# -- python
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((3, 9, 19), Status.FAIL),
        ((3, 10, 0), Status.OK),
        ((3, 13, 5), Status.OK),
        ((3, 14, 0), Status.WARN),
    ],
)
def test_pythons_that_there_are_wheels_for_are_good(
    version: tuple[int, ...], status: Status
) -> None:
    assert judge_version(version).status is status


REQUIRED = [
    "click>=8.1",
    "etcd3==0.12.*",
    "rich>=13",
    "torch>=2.6; extra == 'cpu'",
    'pytest>=9; extra == "dev"',
    "safetensors[torch]>=0.5; extra == 'cpu'",
]


@pytest.mark.parametrize(
    ("installed", "status", "what"),
    [
        ({"click": "8.1", "etcd3": "0.12.0", "rich": "15.0.0"}, Status.OK, "3 packages"),
        (
            {
                "click": "8.1",
                "etcd3": "0.12.0",
                "rich": "15.0.0",
                "torch": "2.13.0+cpu",
                "pytest": "7",
            },
            Status.OK,
            "4 packages",
        ),
        ({"click": "8.1", "etcd3": "0.12.0"}, Status.FAIL, "rich is missing"),
        (
            {"click": "8.0.9", "etcd3": "0.12.0", "rich": "13"},
            Status.FAIL,
            "click 8.0.9 is installed, >=8.1 is needed",
        ),
        (
            {"click": "8.1", "etcd3": "0.13.0", "rich": "13"},
            Status.FAIL,
            "etcd3 0.13.0 is installed, ==0.12 is needed",
        ),
        (
            {"click": "8.1", "etcd3": "0.12.0", "rich": "13", "torch": "2.5.1"},
            Status.FAIL,
            "torch 2.5.1",
        ),
        (
            {"click": "8.1", "etcd3": "0.12.0", "rich": "13", "safetensors": "0.4.9rc1"},
            Status.FAIL,
            "safetensors 0.4.9rc1",
        ),
    ],
)
def test_packages_are_compared_with_what_the_distribution_asks_for(
    installed: dict[str, str], status: Status, what: str
) -> None:
    finding = judge_packages(REQUIRED, installed)
    assert finding.status is status
    assert what in finding.what


def test_a_package_that_only_an_older_python_needs_is_not_missing() -> None:
    def status(marker: str) -> Status:
        return judge_packages([f"tomli>=2; {marker}"], {}).status

    assert status('python_version < "3.10"') is Status.OK
    assert status("python_version < '3.99'") is Status.FAIL


def test_a_checkout_without_metadata_is_no_fault() -> None:
    assert judge_packages([], {}).status is Status.OK


def test_two_wheels_of_the_transfer_engine_fail_and_none_is_as_bad_as_it_is_needed() -> None:
    one, two = list(WHEELS)[:2]
    both = judge_wheels([one, two], wanted=False)
    assert both.status is Status.FAIL
    assert f"pip uninstall -y {one} {two}, then pip install" in both.mend
    assert judge_wheels([one], wanted=True).status is Status.OK
    assert (judge_wheels([], wanted=False).status, judge_wheels([], wanted=True).status) == (
        Status.WARN,
        Status.FAIL,
    )


def test_a_client_of_etcd_that_cannot_be_imported_is_reported_with_the_versions() -> None:
    assert judge_etcd3(None, "0.12.0", "7.1", "1.85").status is Status.OK
    broken = judge_etcd3(TypeError("Descriptors cannot\n be created"), "0.12.0", "4.21", "")
    assert broken.status is Status.FAIL
    assert (
        "with etcd3 0.12.0, protobuf 4.21, grpcio missing: TypeError: Descriptors cannot be created"
        in broken.what
    )


# -- network
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "status", "what"),
    [
        (["10.0.0.5"], Status.OK, "node leads to 10.0.0.5"),
        (["10.0.0.5", "127.0.1.1"], Status.OK, "10.0.0.5"),
        (["127.0.1.1"], Status.WARN, "as Debian's installer sets it up"),
        (["127.0.0.1", "::1"], Status.WARN, "others would reach themselves"),
        ([], Status.WARN, "leads to no address (unknown)"),
    ],
)
def test_a_name_that_leads_back_to_its_own_machine_warns(
    addresses: list[str], status: Status, what: str
) -> None:
    finding = judge_hostname("node", addresses, "unknown")
    assert finding.status is status
    assert what in finding.what


@pytest.mark.parametrize(
    ("address", "given", "etcd_here", "error", "status"),
    [
        ("10.0.0.5", False, False, "", Status.OK),
        ("10.0.0.5", True, True, "", Status.OK),
        ("127.0.0.1", False, True, "", Status.OK),
        ("127.0.0.1", False, False, "", Status.WARN),
        ("127.0.0.1", True, True, "", Status.WARN),
        ("169.254.3.4", True, True, "", Status.WARN),
        ("fe80::1", True, True, "", Status.WARN),
        ("node-7", True, True, "", Status.OK),
        ("10.9.9.9", True, True, "Cannot assign requested address", Status.FAIL),
    ],
)
def test_an_address_is_judged_by_who_can_reach_it(
    address: str, given: bool, etcd_here: bool, error: str, status: Status
) -> None:
    finding = judge_address(address, given, etcd_here, error)
    assert finding.status is status
    assert bool(finding.mend) == (status is not Status.OK)


def test_a_port_can_be_opened_here_and_not_at_an_address_of_another_machine() -> None:
    assert [finding.check for finding in check_address("127.0.0.1", False, True)] == [
        "network.address",
        "network.ports",
    ]
    assert [
        (finding.check, finding.status) for finding in check_address("192.0.2.1", True, True)
    ] == [("network.address", Status.FAIL)]


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "[::]", "255.255.255.255", "224.0.0.1", "ff02::1"]
)
def test_an_address_that_leads_nobody_to_this_machine_fails(address: str) -> None:
    address_of, *_ = check_address(address, True, False)
    assert (address_of.check, address_of.status) == ("network.address", Status.FAIL)
    assert "--host" in address_of.mend


@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_an_address_of_ipv6_is_tried_like_any_other(address: str) -> None:
    assert [(finding.check, finding.status) for finding in check_address(address, False, True)] == [
        ("network.address", Status.OK),
        ("network.ports", Status.OK),
    ]


def test_a_port_that_cannot_be_reached_is_put_down_to_a_firewall() -> None:
    assert judge_port("h:1", None, 0.001).status is Status.OK
    assert "iptables" in judge_port("h:1", Trouble.SILENT, 1.5).mend


@pytest.mark.parametrize(
    ("limit", "status"),
    [(256, Status.WARN), (1024, Status.OK), (resource.RLIM_INFINITY, Status.OK)],
)
def test_few_open_files_warn(limit: int, status: Status) -> None:
    assert judge_files(limit).status is status


# -- torch and the transfer engine
# -----------------------------------------------------------------------------------------------


def test_an_absent_torch_is_as_bad_as_it_is_needed_and_a_broken_one_fails() -> None:
    absent = {"error": "No module named 'torch'", "missing": True}
    assert (judge_torch(absent, wanted=False).status, judge_torch(absent, wanted=True).status) == (
        Status.WARN,
        Status.FAIL,
    )
    assert judge_torch({"error": "undefined symbol"}, wanted=False).status is Status.FAIL
    assert (
        judge_torch({"error": "", "version": "2.13.0", "built_for": "12.8"}, wanted=True).what
        == "torch 2.13.0, built for 12.8"
    )


def torch_sees(devices: list[str], built_for: str = "12.8", no_access: Any = ()) -> dict[str, Any]:
    return {"built_for": built_for, "devices": devices, "no_access": list(no_access)}


@pytest.mark.parametrize(
    ("fact", "driver", "tcp", "within_host"),
    [
        (torch_sees([], ""), False, [Status.SKIPPED], [Status.FAIL]),
        (torch_sees([], ""), True, [Status.WARN], [Status.FAIL]),
        (torch_sees([]), True, [Status.WARN], [Status.FAIL]),
        (torch_sees(["H100"]), True, [Status.OK, Status.SKIPPED], [Status.OK, Status.SKIPPED]),
        (torch_sees(["H100"] * 2), True, [Status.OK, Status.OK], [Status.OK, Status.OK]),
        (
            torch_sees(["H100"] * 2, no_access=[[0, 1]]),
            True,
            [Status.OK, Status.WARN],
            [Status.OK, Status.FAIL],
        ),
    ],
)
def test_gpus_fail_only_if_a_protocol_from_gpu_to_gpu_is_wanted(
    fact: dict[str, Any], driver: bool, tcp: list[Status], within_host: list[Status]
) -> None:
    assert [finding.status for finding in judge_devices(fact, driver, "tcp")] == tcp
    for protocol in WITHIN_HOST:
        found = [finding.status for finding in judge_devices(fact, driver, protocol)]
        assert found == within_host


def kernels_are(**facts: Any) -> dict[str, Any]:
    return {"error": "", "archs": [90, 100], "folder": "/home/a/.cache", **facts}


@pytest.mark.parametrize(
    ("fact", "status", "what"),
    [
        (
            kernels_are(),
            Status.OK,
            "the kernels for sm_90, sm_100 are in /home/a/.cache: no Triton is needed",
        ),
        (kernels_are(triton="3.4.0", can_be_kept=True), Status.OK, "engines warm does so before"),
        (
            kernels_are(triton="3.4.0", can_be_kept=False),
            Status.WARN,
            "each process compiles the kernels for sm_90, sm_100: /home/a/.cache cannot be written",
        ),
        (
            kernels_are(archs=[], triton="3.4.0", can_be_kept=False),
            Status.OK,
            "triton 3.4.0 can be imported",
        ),
        (
            {"error": "No module named 'triton'", "mend": ""},
            Status.FAIL,
            "not compiled, and triton is not installed",
        ),
        (
            {"error": "undefined symbol: x", "mend": ""},
            Status.FAIL,
            "not compiled, and triton cannot be imported: undefined symbol: x",
        ),
    ],
)
def test_cuda_ipc_needs_compiled_kernels_or_triton(
    fact: dict[str, Any], status: Status, what: str
) -> None:
    finding = judge_kernels(fact)
    assert finding.status is status
    assert what in finding.what
    assert bool(finding.mend) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("complaint", "mend"),
    [
        ("libibverbs.so.1: cannot open shared object file", "apt-get install libibverbs1"),
        (
            "libcudart.so.12: cannot open shared object file",
            "pip install 'engine-registry[cpu]' instead",
        ),
        ("No module named 'mooncake'", "pip install 'engine-registry[cpu]' (or"),
        ("undefined symbol: x", "reinstall it: pip install"),
    ],
)
def test_a_transfer_engine_that_cannot_be_imported_says_what_to_install(
    complaint: str, mend: str
) -> None:
    what, remedy = described(EngineUnavailable(*_what_to_install(complaint)))
    finding = judge_mooncake({"error": what, "mend": remedy}, "tcp", wanted=True)
    assert finding.status is Status.FAIL
    assert finding.mend.startswith(mend)


@pytest.mark.parametrize(
    ("protocol", "transports", "status"),
    [
        ("tcp", ["Rdma", "Tcp"], Status.OK),
        ("rdma", ["Rdma", "Tcp"], Status.OK),
        ("nvlink_intra", ["Rdma", "Tcp"], Status.FAIL),
        ("nvlink_intra", ["IntraNodeNvlink", "Rdma", "Tcp"], Status.OK),
        ("nvlink_intra", [], Status.OK),  # stripped of its names
    ],
)
def test_a_wheel_without_the_wanted_transport_fails(
    protocol: str, transports: list[str], status: Status
) -> None:
    assert (
        judge_mooncake({"error": "", "transports": transports}, protocol, wanted=True).status
        is status
    )


@pytest.mark.parametrize(
    ("fact", "status", "what"),
    [
        (
            {"nbytes": 64 << 20, "seconds": 0.04, "equal": True},
            Status.OK,
            "67.1 MB read over tcp on this machine at 1.7 GB/s",
        ),
        ({"nbytes": 64 << 20, "seconds": 1.0, "equal": True}, Status.WARN, "slow"),
        ({"nbytes": 64 << 20, "seconds": 0.04, "equal": False}, Status.FAIL, "not as they were"),
        (
            {"error": "cannot read from h:1", "mend": ""},
            Status.FAIL,
            "over tcp fails: cannot read from h:1",
        ),
        ({"skipped": "not here"}, Status.SKIPPED, "use --peer"),
    ],
)
def test_a_loopback_is_judged_by_its_bytes_and_its_speed(
    fact: dict[str, Any], status: Status, what: str
) -> None:
    finding = judge_loopback({"error": "", **fact}, "tcp")
    assert finding.status is status
    assert what in finding.what


# -- peers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "rank", "status", "what"),
    [
        ((0, 1), None, Status.OK, "all of 2 ranks, version 3"),
        ((0,), None, Status.FAIL, "missing rank 1 of 2"),
        ((0,), 1, Status.FAIL, "rank 1 of qwen is not registered"),
        ((), None, Status.FAIL, "qwen is not registered"),
    ],
)
def test_an_instance_fails_if_a_rank_is_not_registered(
    ranks: tuple[int, ...], rank: int | None, status: Status, what: str
) -> None:
    finding = judge_instance(assess("qwen", [a_record(rank=rank) for rank in ranks]), rank)
    assert finding.status is status
    assert what in finding.what


def test_an_instance_whose_ranks_are_not_ready_warns() -> None:
    assert (
        judge_instance(
            assess("qwen", [a_record(rank=0), a_record(rank=1, state=RankState.DRAINING)]), None
        ).status
        is Status.WARN
    )


def test_an_instance_or_a_rank_that_is_not_registered_but_held_is_said_to_be() -> None:
    until = "2026-01-02T03:09:05.678Z"
    held = a_record(ended="process ended", held_until=until)
    why = f"held until {until}: its process has ended"
    gone = judge_instance(assess("qwen", [held]), None)
    assert (gone.status, gone.what) == (
        Status.FAIL,
        f"qwen is not registered: rank 0 is {why}",
    )
    half = assess("qwen", [held, a_record(rank=1)])
    assert judge_instance(half, None).what == f"qwen: missing rank 0 of 2; rank 0 is {why}"
    assert judge_instance(half, 0).what == f"rank 0 of qwen is not registered: it is {why}"


LISTENS = Dialled(0.001)
HEADER = {"error": "", "read_s": 0.0005, "contact_s": 0.003, "version": 3, "updating": False}


def judged(
    line: Dialled | None = LISTENS,
    header: dict[str, Any] | None = HEADER,
    engine_error: str = "",
    **fields: Any,
) -> Finding:
    return judge_rank(a_record(**fields), "tcp", "here", line, header, engine_error, 2.0)


def test_a_rank_that_answers_as_its_record_says_is_good() -> None:
    finding = judged()
    assert finding.status is Status.OK
    assert finding.what.startswith(
        "qwen/0 at 10.0.0.1:15000: header read in 0.5 ms (first contact 3.0 ms)"
    )


@pytest.mark.parametrize(
    ("case", "status", "what", "mend"),
    [
        (
            {"line": Dialled(0.1, Trouble.REFUSED)},
            Status.FAIL,
            "nobody listens there",
            "process 4711 on node-1 has ended",
        ),
        (
            {"line": Dialled(2.0, Trouble.SILENT)},
            Status.FAIL,
            "no answer to a connection within 2.0 s",
            "firewall",
        ),
        (
            {"line": Dialled(0.1, Trouble.NAME, "unknown")},
            Status.FAIL,
            "unknown",
            "an address (--host), not a name",
        ),
        (
            {"line": Dialled(0.1, Trouble.NO_WAY, "No route to host")},
            Status.FAIL,
            "No route to host",
            "ip route get",
        ),
        ({"line": None}, Status.FAIL, "no host:port", "engines evict"),
        (
            {"session_id": "127.0.0.1:7"},
            Status.FAIL,
            "a loopback address, registered on node-1",
            "--host",
        ),
        ({"session_id": "127.0.0.1:7", "host": "here"}, Status.OK, "header read", ""),
        ({"protocol": "rdma"}, Status.WARN, "serves over rdma, not tcp", "--protocol rdma"),
        ({"header_addr": 0}, Status.SKIPPED, "it has no header", ""),
        (
            {"engine_error": "not installed"},
            Status.SKIPPED,
            "its header was not read: not installed",
            "",
        ),
        (
            {"header": None},
            Status.FAIL,
            "its memory is not read within 2.0 s",
            "process 4711 on node-1 is stopped or hangs",
        ),
        (
            {"header": {"error": "another process", "lost": True}},
            Status.FAIL,
            "another process",
            "engines evict",
        ),
        ({"header": {"error": "cannot read"}}, Status.FAIL, "cannot read", "firewall"),
        ({"header": {"error": "crashed", "crashed": True}}, Status.FAIL, "crashed", "--debug"),
        (
            {"header": {**HEADER, "version": 4}},
            Status.WARN,
            "version 4, the record says 3",
            "run this again",
        ),
        ({"header": {**HEADER, "updating": True}}, Status.WARN, "being changed", "run this again"),
        ({"header": {**HEADER, "read_s": 0.3}}, Status.WARN, "header read in 300 ms", "ping"),
    ],
)
def test_what_is_wrong_with_a_rank_is_reported_with_what_mends_it(
    case: dict[str, Any], status: Status, what: str, mend: str
) -> None:
    finding = judged(**case)
    assert finding.status is status
    assert what in finding.what
    assert mend in finding.mend
    assert bool(finding.mend) == (status in (Status.WARN, Status.FAIL))


def test_the_name_of_this_machine_is_what_records_say() -> None:
    assert (
        judge_rank(
            a_record(host=socket.gethostname(), session_id="127.0.0.1:7"),
            "tcp",
            socket.gethostname(),
            LISTENS,
            HEADER,
            "",
            2.0,
        ).status
        is Status.OK
    )
