"""deploy/prometheus and deploy/grafana: queries are about metrics, labels and jobs that exist, and
each alert has a section of docs/how-to/alerts.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

import engine_loader.metrics  # noqa: F401  declares what it counts
import engine_registry.watching.metrics  # noqa: F401  as above
from engine_registry.telemetry import metrics
from tests.support.checkout import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "engine-registry.rules.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "engine-registry.json").read_text())
RUNBOOKS = (ROOT / "docs" / "how-to" / "alerts.md").read_text("utf-8")
SUFFIXES = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
SERIES = {
    meter.name + suffix: meter for meter in metrics.declared() for suffix in SUFFIXES[meter.kind]
}
OF_PROMETHEUS = {"instance", "job", "le"}


def queries() -> Iterator[tuple[str, str]]:
    for name, rule in ALERTS.items():
        yield name, rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']}, {target['refId']}", target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]


QUERIES = dict(queries())


@pytest.mark.parametrize("title", QUERIES)
def test_a_query_names_metrics_labels_and_values_that_exist(title: str) -> None:
    query = QUERIES[title]
    names = re.findall(r"\b(engines_\w+)|\bup\b", query)
    assert names
    assert [name for name in names if name and name not in SERIES] == []
    for name, matchers in re.findall(r"\b(engines_\w+)\{([^}]*)\}", query):
        for label, values in re.findall(r"(\w+)(?:=|!=|=~|!~)\"([^\"]*)\"", matchers):
            meter = SERIES[name]
            assert label in {*meter.labels, *OF_PROMETHEUS}
            if meter.values:
                assert set(values.split("|")) <= set(meter.values)
    known = {label for name in names if name for label in SERIES[name].labels} | OF_PROMETHEUS
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in labels.split(",") if label} <= known


def test_the_jobs_are_those_of_the_configuration() -> None:
    jobs = {each["job_name"] for each in CONFIG["scrape_configs"]}
    assert CONFIG["rule_files"] == ["engine-registry.rules.yml"]
    for query in QUERIES.values():
        for job in re.findall(r'job=~?"([^"]+)"', query):
            assert any(re.fullmatch(job, each) for each in jobs), query


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_means_and_where_its_runbook_is(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page == "https://docs.example.com/engine-registry/how-to/alerts/"
    assert anchor == alert.lower()  # as the site makes it of the heading
    section = RUNBOOKS.split(f"\n### {alert}\n", 1)[1].strip()
    assert section.startswith(f"{rule['labels']['severity'].capitalize()}. ")


def test_every_runbook_is_of_an_alert() -> None:
    assert set(re.findall(r"^### (\w+)$", RUNBOOKS, re.MULTILINE)) == set(ALERTS)


def test_the_panels_have_titles_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    for of_one in ("id", "title"):
        assert len({panel[of_one] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_every_panel_asks_the_prometheus_that_is_chosen() -> None:
    (chosen,) = (
        each["name"] for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource"
    )
    found = re.findall(r'"uid": "([^"]+)"', json.dumps(DASHBOARD["panels"]))
    assert set(found) == {f"${{{chosen}}}"}
