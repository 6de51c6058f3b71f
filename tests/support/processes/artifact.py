"""Pulls an artifact and stays at the moment when all of its files are written and none is moved:
`artifact NAME FOLDER FIELD=VALUE`.

It prints `written` then, and goes on with a line on standard input. At the end it prints the facts
of the report, as JSON.
"""

from __future__ import annotations

import json
import sys

from engine_cli.options import engine_log
from engine_loader import pull_artifact
from engine_registry import failpoints
from tests.support.registry import connect
from tests.support.transfer import engine_at


def main(name: str, folder: str, field: str) -> None:
    def wait() -> None:
        print("written", flush=True)
        sys.stdin.readline()

    failpoints.ACTIONS["artifact.written"] = wait
    key, _, value = field.partition("=")
    with engine_log(), connect() as registry, engine_at("127.0.0.1") as engine:
        report = pull_artifact(registry, engine, name, folder, {key: value})
    print(json.dumps(report and report.facts()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
