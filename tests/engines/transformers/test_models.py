"""Real models of transformers are built without memory and filled from one that is published."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from engine_registry.etcd.local import LocalEtcd
from tests.engines.vllm.conftest import PYTHON
from tests.support.checkout import ROOT

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def etcd() -> Iterator[LocalEtcd]:
    with LocalEtcd() as etcd:
        yield etcd


def run(program: str, etcd: LocalEtcd) -> str:
    """In the environment of vLLM, which has transformers."""
    done = subprocess.run(
        [PYTHON, "-m", program, etcd.endpoint, f"/{uuid.uuid4().hex[:8]}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_kind_of_model_answers_as_the_one_that_it_was_filled_from(etcd: LocalEtcd) -> None:
    found = json.loads(run("tests.engines.transformers.models", etcd))
    assert len(found) == 4
    for name, facts in found.items():
        assert facts["same answer"], name
        assert facts["ties"][0] == facts["ties"][1], name
        assert facts["without memory"] == [], name
    assert found["tied"]["ties"][0] != []
    assert found["by an auto class"]["dtype"] == "torch.bfloat16"


def test_the_code_of_the_page_runs(etcd: LocalEtcd) -> None:
    assert run("tests.engines.transformers.page", etcd).strip().endswith(" parameters")
