"""The gateway's routes:

SGLang's paths, bodies and statuses over a registry, and for whatever is sent an answer that says
why.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp

from engine_registry import ModelIdentity, RankState
from engine_registry.gateway.answers import Answers
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.claims import Seeds, Served
from engine_registry.gateway.limits import ConnectionLimiter, Limits
from engine_registry.gateway.probe import Answer
from engine_registry.gateway.routes import Routes
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record import GATEWAY, RankRecord
from engine_registry.schema.record_format import decode, encode
from tests.support.builders import a_manifest, a_record, an_entry
from tests.support.fake_etcd import FakeEtcd

SEED, OTHER_SEED = "10.0.0.1:15000", "10.0.0.2:15000"
PATHS = (
    "/get_transfer_engine_info",
    "/remote_instance_transfer_engine_info",
    "/get_remote_instance_transfer_engine_info",
)
OLD_PATHS = PATHS[1:]  # of the inference server
REGISTER = "/register_transfer_engine_info"
LIMITS = Limits(body_nbytes=10_000, bodies_nbytes=20_000, tensors=50)


class Client:
    """Asks an app without a network, in a separate event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        )
        self.headers = self._client.headers

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def put(
        self, path: str, content: bytes | Iterable[bytes] = b"", **options: Any
    ) -> httpx.Response:
        return self.request(
            "PUT",
            path,
            content=content if isinstance(content, bytes) else _one_by_one(content),
            **options,
        )

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._client.request(method, path, **options))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()


async def _one_by_one(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class Service:
    """The routes over an etcd in memory, without a network."""

    def __init__(self, token: str | None = None, limits: Limits = LIMITS) -> None:
        self.etcd = FakeEtcd()
        self.listening = {SEED, OTHER_SEED}
        self.calls, self.parsing = Calls(2, "test"), Calls(1, "test")
        limiter = ConnectionLimiter(limits)
        seeds = Seeds(self.etcd, self.calls, 60.0, self._probe)
        routes = Routes(
            Served("q", "qwen", 2),
            Answers(self.etcd, self.calls, 2.0),
            seeds,
            self.parsing,
            limiter,
            token,
        )
        self.client = Client(limiter.watching(routes.app()))

    async def _probe(self, session_id: str) -> Answer:
        return Answer.LISTENS if session_id in self.listening else Answer.REFUSES

    def put(self, path: str = REGISTER, **fields: Any) -> Any:
        return self.client.put(path, content=json.dumps(seed_says(**fields)).encode())

    def record(self, instance: str = "q", rank: int = 0) -> RankRecord:
        key = f"/engines/{instance}/{rank}"
        return decode(key, self.etcd.value(key))

    def publish(self, record: RankRecord) -> RankRecord:
        """As our library does."""
        ref, parts = manifests.encode(
            a_manifest(an_entry("w", 4096, 16, dtype="float32", shape=(2, 2)))
        )
        record = replace(record, manifest=ref)
        claim(self.etcd, record, parts, self.etcd.grant(10))
        return record


def seed_says(session_id: str = SEED, weights: Any = None, **fields: Any) -> dict[str, Any]:
    info = {
        "session_id": session_id,
        "weights_info_dict": {"w": [4096, 4, 2]} if weights is None else weights,
    }
    return {"tp_rank": 0, "transfer_engine_info": info, **fields}


@pytest.fixture
def service() -> Iterator[Service]:
    with using(Service()) as service:
        yield service


@contextmanager
def using(service: Service) -> Iterator[Service]:
    yield service
    service.client.close()
    service.calls.close()
    service.parsing.close()


# -- registering
# --------------------------------------------------------------------------------------------------


def test_a_registered_rank_is_a_leased_record_that_gateways_keep_and_all_paths_answer_with_it(
    service: Service,
) -> None:
    answer = service.put()
    assert (answer.status_code, answer.text) == (200, "OK")
    record = service.record()
    assert (record.kept_by, record.session_id, record.world_size, str(record.model)) == (
        GATEWAY,
        SEED,
        2,
        "qwen",
    )
    assert (record.header_addr, record.protocol, record.host) == (0, "unknown", "10.0.0.1")
    assert list(service.etcd.leases.values()) == [60.0]
    for path in PATHS:
        for prefix in ("", "/instances/q"):
            found = service.client.get(f"{prefix}{path}", params={"rank": 0})
            assert found.status_code == 200
            assert found.json() == {
                "rank": 0,
                "remote_instance_transfer_engine_info": [SEED, {"w": [4096, 4, 2]}],
            }


def test_other_instances_are_served_under_their_names_with_the_world_size_that_is_given(
    service: Service,
) -> None:
    assert (
        service.put(
            "/instances/llama/register_transfer_engine_info?world_size=8", rank=7
        ).status_code
        == 200
    )
    assert (
        service.put(
            "/instances/llama/register_transfer_engine_info", rank=6, world_size=8
        ).status_code
        == 200
    )
    assert service.record("llama", 7).world_size == 8
    assert str(service.record("llama", 7).model) == "llama"
    assert (
        service.client.get("/instances/llama/get_transfer_engine_info?rank=6").json()["rank"] == 6
    )
    assert service.client.get("/get_transfer_engine_info?rank=6").status_code == 404


def test_a_draft_model_does_not_take_its_targets_rank(service: Service) -> None:
    assert service.put(role="target").status_code == 200
    assert service.put(session_id=OTHER_SEED, role="draft").status_code == 200
    assert service.record("q.draft").session_id == OTHER_SEED
    found = [
        service.client.get("/get_transfer_engine_info", params={"rank": 0, **role})
        for role in ({}, {"role": "draft"})
    ]
    assert [each.json()["remote_instance_transfer_engine_info"][0] for each in found] == [
        SEED,
        OTHER_SEED,
    ]


def test_a_rank_outside_of_the_world_size_is_refused_with_what_to_give(service: Service) -> None:
    answer = service.put(rank=2)
    assert answer.status_code == 400
    for word in ("rank 2", "world size 2", "?world_size=N", "`world_size`"):
        assert word in answer.json()["detail"]


def test_what_is_malformed_is_reported_and_leaves_nothing_in_etcd(service: Service) -> None:
    for answer in (
        service.client.put(REGISTER, content=b"{"),
        service.client.put(REGISTER),
        service.put(rank=-1),
        service.put(weights={"w": [1, 2]}),
        service.put(weights={f"w{n}": [1, 1, 1] for n in range(51)}),
        service.put("/instances/a b/register_transfer_engine_info"),
        service.put(f"{REGISTER}?world_size=x"),
        service.put(role="a b"),
    ):
        assert answer.status_code == 400
        assert answer.json()["detail"]
    assert service.etcd.keys == []
    assert service.etcd.leases == {}


def test_a_seed_that_registers_again_replaces_its_record_and_leaves_no_old_lease(
    service: Service,
) -> None:
    service.put()
    first = service.record()
    assert service.put(weights={"v": [1, 1, 1]}).status_code == 200
    assert service.record().incarnation != first.incarnation
    assert len(service.etcd.leases) == 1
    assert not any(first.incarnation in key for key in service.etcd.keys)
    assert service.client.get(PATHS[0], params={"rank": 0}).json()[
        "remote_instance_transfer_engine_info"
    ][1] == {"v": [1, 1, 1]}


def test_a_live_seed_keeps_its_rank_and_one_that_does_not_answer_loses_it(service: Service) -> None:
    service.put()
    refused = service.put(session_id=OTHER_SEED)
    assert refused.status_code == 409
    assert SEED in refused.json()["detail"]
    assert "end its registration" in refused.json()["detail"]
    assert len(service.etcd.leases) == 1
    service.listening.remove(SEED)
    assert service.put(session_id=OTHER_SEED).status_code == 200
    assert service.record().session_id == OTHER_SEED


def test_a_rank_that_our_library_holds_is_a_conflict(service: Service) -> None:
    service.publish(a_record(instance="q", model=ModelIdentity("qwen")))
    service.listening.clear()
    answer = service.put()
    assert answer.status_code == 409
    assert "already registered (host node-1, pid 4711" in answer.json()["detail"]
    assert service.record().kept_by == ""


def test_a_seed_that_disagrees_with_a_sibling_is_a_conflict_and_the_rank_before_it_stays(
    service: Service,
) -> None:
    for rank in (0, 1):
        service.put("/instances/x/register_transfer_engine_info?world_size=2", rank=rank)
    before = service.record("x", 0)
    answer = service.put("/instances/x/register_transfer_engine_info?world_size=4", rank=0)
    assert answer.status_code == 409
    assert "world_size 4" in answer.json()["detail"]
    assert service.record("x", 0) == before


def test_of_two_seeds_that_register_one_rank_at_once_the_later_sees_the_other(
    service: Service,
) -> None:
    rival = a_record(
        instance="q",
        kept_by=GATEWAY,
        session_id=OTHER_SEED,
        model=ModelIdentity("qwen"),
        generation="",
        topology={},
    )

    def overtake() -> None:
        service.etcd.commit([], [Put(rival.key, encode(rival), service.etcd.grant(10))])

    service.etcd.before_commit = overtake  # the first commit is that of the seed's claim
    answer = service.put()
    assert answer.status_code == 409
    assert OTHER_SEED in answer.json()["detail"]


# -- asking
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query", ["", "?rank=", "?rank=-1", "?rank=x", "?rank=1.5", "?rank=%00", "?rank=99999999999"]
)
def test_a_rank_that_is_no_number_is_a_bad_request(service: Service, query: str) -> None:
    assert service.client.get(f"{PATHS[0]}{query}").status_code == 400
    assert "rank" in service.client.get(f"{PATHS[0]}{query}").json()["detail"]


def test_an_unknown_rank_is_not_found_and_to_the_older_paths_a_bad_request(
    service: Service,
) -> None:
    assert service.client.get(f"{PATHS[0]}?rank=5").status_code == 404
    for path in OLD_PATHS:
        for query in ("?rank=5", "?rank=x", ""):
            answer = service.client.get(f"{path}{query}")
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]


def test_a_rank_of_our_library_is_served_while_it_is_ready_and_not_while_its_weights_change(
    service: Service,
) -> None:
    record = service.publish(a_record(instance="q", state=RankState.READY))

    def get() -> httpx.Response:
        return service.client.get(PATHS[0], params={"rank": 0})

    assert get().json()["remote_instance_transfer_engine_info"] == [
        record.session_id,
        {"w": [4096, 4, 4]},
    ]
    for state in (RankState.UPDATING, RankState.DRAINING, RankState.LOADING):
        service.etcd.put(record.key, encode(replace(record, state=state)))
        assert get().status_code == 404
        assert state.value in get().json()["detail"]
    service.etcd.put(record.key, encode(replace(record, ended="evicted")))
    assert "has ended: evicted" in get().json()["detail"]
    until = "2026-01-02T03:09:05.678Z"
    held = replace(record, ended="process ended", held_until=until)
    service.etcd.put(record.key, encode(held))
    assert get().status_code == 404
    assert f"is held until {until}: its process has ended" in get().json()["detail"]
    service.etcd.put(record.key, encode(record))
    assert get().status_code == 200


def test_a_record_or_manifest_that_cannot_be_read_is_reported(service: Service) -> None:
    service.etcd.put("/engines/q/0", b"{")
    service.etcd.put("/engines/q/1", encode(a_record(instance="q", rank=1)))
    for rank, words in ((0, "is damaged"), (1, "manifest of /engines/q/1 is not there")):
        answer = service.client.get(PATHS[0], params={"rank": rank})
        assert answer.status_code == 404
        assert words in answer.json()["detail"]


def test_an_etcd_that_is_away_is_a_503_that_says_so(service: Service) -> None:
    service.etcd.available = False
    for answer in (service.put(), service.client.get(f"{PATHS[0]}?rank=0")):
        assert answer.status_code == 503
        assert answer.json()["detail"] == "etcd is away"
    assert service.client.get(f"{OLD_PATHS[0]}?rank=0").json() == {
        "error": {"message": "etcd is away"}
    }
    assert service.client.get("/health").text == "OK"


def test_unknown_paths_and_methods_are_reported(service: Service) -> None:
    assert "/nowhere" in service.client.get("/nowhere").json()["detail"]
    assert service.client.get("/health/").status_code == 404
    assert service.client.request("POST", REGISTER).status_code == 405


# -- limits
# --------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(service: Service) -> None:
    for content in (b" " * 10_001, iter([b" " * 6000, b" " * 6000]), iter([b" " * 9000] * 9)):
        answer = service.client.put(REGISTER, content=content)
        assert answer.status_code == 413
        assert "larger than 10000 bytes" in answer.json()["detail"]
        assert answer.headers["connection"] == "close"


def test_bodies_that_together_are_too_large_are_refused_and_room_comes_back() -> None:
    with using(Service(limits=replace(LIMITS, bodies_nbytes=500))) as service:
        assert service.client.put(REGISTER, content=b" " * 501).status_code == 503
        assert service.put().status_code == 200


def test_a_token_is_asked_for_everywhere_but_for_health() -> None:
    with using(Service(token="s3cret")) as service:
        for path in PATHS:
            for headers in (
                {},
                {"Authorization": "Bearer x"},
                {"Authorization": "s3cret"},
                {"Authorization": "Bearer s\xe9cret"},
            ):
                answer = service.client.get(
                    f"{path}?rank=0", headers={k: v.encode("latin-1") for k, v in headers.items()}
                )
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        assert service.put().status_code == 401
        assert service.client.get("/health").status_code == 200
        service.client.headers["Authorization"] = "bearer s3cret"
        assert service.put().status_code == 200
        assert service.client.get(f"{PATHS[0]}?rank=0").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda data: json.dumps(data).encode()),
    st.builds(
        lambda rank, session, weights, world: json.dumps(
            {
                "rank": rank,
                "world_size": world,
                "transfer_engine_info": {"session_id": session, "weights_info_dict": weights},
            }
        ).encode(),
        JSON | st.integers(0, 3),
        JSON | st.just(SEED),
        JSON | st.dictionaries(st.text(max_size=5), st.lists(st.integers())),
        JSON,
    ),
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Service]:
    with using(Service()) as service:
        yield service


@given(BODIES, st.text(max_size=10), st.text(max_size=10))
def test_whatever_is_sent_is_never_a_server_error(
    fuzzed: Service, body: bytes, name: str, query: str
) -> None:
    client = fuzzed.client
    assert client.put(REGISTER, content=body).status_code in (200, 400, 409)
    params = {"rank": query, "world_size": query, "role": query}
    for path in PATHS:
        assert client.get(path, params=params).status_code in (200, 400, 404)
    assert client.put(
        f"/instances/{quote(name)}{REGISTER}", params=params, content=body
    ).status_code in (200, 400, 404, 405, 409)
