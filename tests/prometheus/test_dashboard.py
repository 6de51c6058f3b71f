"""deploy/grafana and the rules before a real Prometheus, which scrapes a watch, a rank and a load
that serves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from safetensors.torch import save_file

from tests.integration.conftest import Processes, line_of
from tests.integration.test_metrics import SERVED, Scraped
from tests.prometheus.server import Prometheus
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "engine-registry.json").read_text())
QUERIES = {
    f"{panel['title']}, {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
VARIABLES = {"$__rate_interval": "30s", "$engine_instance": ".*"}  # as Grafana fills them in


@pytest.fixture
def fleet(processes: Processes, namespace: str, tmp_path: Path) -> dict[str, list[int]]:
    """The ports of a watch, of a rank of `a`, and of a load from it that serves as `b`, by job."""
    weights = tmp_path / "w.safetensors"
    save_file({"w": torch.rand(1000, 100)}, weights)
    options = ("--namespace", namespace, *SERVED)
    watch = Scraped(processes.engines("watch", "--json", *options))
    where = ("--rank", "0", "--host", "127.0.0.1", *options)
    rank = processes.engines(
        "register", "a", *where, "--world-size", "1", "--weights", str(weights)
    )
    replica = processes.engines("load", "a", *where, "--serve", "b")
    ranks = [Scraped(rank), Scraped(replica)]
    assert line_of(replica).startswith("loaded a/0")
    wait_until(lambda: watch("registry_instance_ready", engine_instance="b") == 1)
    return {"engines-watch": [watch.port], "engines-rank": [each.port for each in ranks]}


@pytest.fixture
def server(prometheus: Path, fleet: dict[str, list[int]], tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(prometheus, tmp_path, fleet)
    try:
        server.until_scraped(3)
        yield server
    finally:
        server.end()


def asked(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def test_every_panel_shows_what_happened(server: Prometheus) -> None:
    found = {title: server.query(asked(query)) for title, query in QUERIES.items()}
    assert [title for title, series in found.items() if not series] == []
    values = {title: [value for _, value in series] for title, series in found.items()}
    assert values["Instances ready, A"] == values["Ranks, A"] == [2]
    assert values["Instances not ready, A"] == values["Ranks missing, A"] == [0]
    assert values["Watches, A"] == [1]
    assert {labels["engine_instance"] for labels, _ in found["Instances, A"]} == {"a", "b"}


def test_a_variable_lists_the_instances(server: Prometheus) -> None:
    (query,) = (
        each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"
    )
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert server.ask(f"label/{label}/values", **{"match[]": metric}) == ["a", "b"]


def test_rules_run_and_an_alert_says_which_instance_is_gone(
    server: Prometheus, processes: Processes, namespace: str
) -> None:
    wait_until(lambda: {each["health"] for each in rules(server)} == {"ok"})
    assert active(server) == {}
    processes.run("evict", "b", "--namespace", namespace)
    wait_until(lambda: "InstanceGone" in active(server))
    alert = active(server)["InstanceGone"]
    assert alert["annotations"]["summary"] == "The instance b is gone"
    assert alert["labels"]["severity"] == "critical"


def rules(server: Prometheus) -> list[Any]:
    return [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]


def active(server: Prometheus) -> dict[str, Any]:
    """Alerts that fire, or would if it stayed so."""
    return {each["labels"]["alertname"]: each for each in server.ask("alerts")["alerts"]}


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Its types drop what they do not know."""
    register_default_plugins()
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))
    assert list(unknown(DASHBOARD, again)) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    register_default_plugins()
    wrong = json.loads(json.dumps(DASHBOARD))
    wrong["panels"][1]["targets"][0]["expression"] = "up"
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(wrong)))
    assert list(unknown(wrong, again)) == ["/panels/1/targets/0/expression"]


def unknown(mine: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """What is not, or is not the same, in `theirs`."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        mine, theirs = dict(enumerate(mine)), dict(enumerate(theirs))
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        if mine != theirs:
            yield path
        return
    for name, value in mine.items():
        if name in theirs:
            yield from unknown(value, theirs[name], f"{path}/{name}")
        else:
            yield f"{path}/{name}"
