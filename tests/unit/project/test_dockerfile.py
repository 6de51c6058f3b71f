"""Dockerfile, without Docker: what each EXTRA installs, and that the image runs without rights."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import msgspec
import pytest

from tests.support.checkout import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra: str) -> subprocess.CompletedProcess[str]:
    """What the first stage would ask pip for."""
    (code,) = re.findall(r'python -c "(.*?)" > requirements.txt', DOCKERFILE, re.S)
    return subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{code}"'],
        cwd=ROOT,
        env={**os.environ, "EXTRA": extra},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python has tomllib")
@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13"])
def test_an_image_has_one_build_of_the_transfer_engine_and_all_that_commands_need(
    extra: str,
) -> None:
    ran = requirements(extra)
    assert ran.returncode == 0, ran.stderr
    wanted = [*PROJECT["dependencies"], *EXTRAS[extra], *EXTRAS["gateway"], *EXTRAS["metrics"]]
    assert ran.stdout.splitlines() == wanted
    assert len([each for each in wanted if each.startswith("mooncake")]) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python has tomllib")
def test_an_extra_that_does_not_exist_ends_the_build() -> None:
    assert "KeyError: 'cuda11'" in requirements("cuda11").stderr


def test_an_image_runs_as_a_user_without_rights_whom_the_manifests_name() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "\nUSER engines\n" in final
    (uid,) = re.findall(r"useradd --uid (\d+)", final)
    manifest = ROOT / "deploy" / "kubernetes" / "engines" / "ranks" / "rank.yaml"
    assert f"runAsUser: {uid}\n" in manifest.read_text()
