"""A real Prometheus on 127.0.0.1 with the configuration of deploy/prometheus, and its answers."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from engine_registry.etcd.ports import free_port
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

FOLDER = ROOT / "deploy" / "prometheus"


class Prometheus:
    """Scrapes and looks at its rules each second. `targets` are ports, by job."""

    def __init__(self, binary: Path, folder: Path, targets: dict[str, list[int]]) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
        jobs = {each["job_name"]: each for each in config["scrape_configs"]}
        config["scrape_configs"] = [
            {**jobs[job], "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in targets.items()
        ]
        path, address = folder / "prometheus.yml", f"127.0.0.1:{free_port()}"
        path.write_text(yaml.safe_dump(config))
        self._url = f"http://{address}/api/v1"
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={path}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, **query: str) -> Any:
        url = f"{self._url}/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  on 127.0.0.1
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        result = self.ask("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def value(self, expression: str) -> float | None:
        """Of an expression with one series at most."""
        found = self.query(expression)
        assert len(found) <= 1
        return found[0][1] if found else None

    def until_scraped(self, scrapes: int) -> None:
        """All targets answered so often."""
        wait_until(lambda: self.process.poll() is not None or self._answers())
        assert self.process.returncode is None, self.log.read_text()[-2000:]
        wait_until(lambda: (self.value("min(sum_over_time(up[5m]))") or 0) >= scrapes)

    def _answers(self) -> bool:
        try:
            return bool(self.ask("targets"))
        except OSError:
            return False

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
