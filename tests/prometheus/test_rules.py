"""deploy/prometheus, as Prometheus' own tool sees it: each alert fires when it should, and not when
ranks load.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus.cases import CASES, Series
from tests.support.checkout import ROOT

FOLDER = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((FOLDER / "engine-registry.rules.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
QUIET = [(alert, when) for alert, cases in CASES.items() for when in cases.quiet]


@pytest.fixture(scope="module")
def bare_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without annotations, which promtool would compare word by word."""
    bare = [
        {**group, "rules": [{**rule, "annotations": {}} for rule in group["rules"]]}
        for group in RULES["groups"]
    ]
    path = tmp_path_factory.mktemp("rules") / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": bare}))
    return path


def run(promtool: Path, *args: str) -> None:
    ran = subprocess.run([promtool, *args], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def expect(promtool: Path, rules: Path, alert: str, series: Series, alerts: list[Any]) -> None:
    minutes = f"{CASES[alert].minutes}m"
    looks = {"eval_time": minutes, "alertname": alert, "exp_alerts": alerts}
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [looks],
    }
    path = rules.with_name("case.yml")
    path.write_text(json.dumps({"rule_files": [str(rules)], "tests": [case]}))
    run(promtool, "test", "rules", str(path))


def test_the_rules_and_the_configuration_are_valid(promtool: Path) -> None:
    run(promtool, "check", "rules", str(FOLDER / "engine-registry.rules.yml"))
    run(promtool, "check", "config", str(FOLDER / "prometheus.yml"))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert set(CASES) == set(ALERTS)
    assert [alert for alert, cases in CASES.items() if not cases.quiet] == []


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires(promtool: Path, bare_rules: Path, alert: str) -> None:
    labels = {"severity": ALERTS[alert]["labels"]["severity"], **CASES[alert].labels}
    expect(promtool, bare_rules, alert, CASES[alert].fires, [{"exp_labels": labels}])


@pytest.mark.parametrize(("alert", "when"), QUIET)
def test_an_alert_does_not_fire(promtool: Path, bare_rules: Path, alert: str, when: str) -> None:
    expect(promtool, bare_rules, alert, CASES[alert].quiet[when], [])
