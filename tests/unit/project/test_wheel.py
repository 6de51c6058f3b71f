"""What users install: the three packages, and nothing of the checkout beside them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from scripts.dist import MINORS
from tests.support.checkout import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_holds_the_three_packages_and_every_module_of_them(wheel: zipfile.ZipFile) -> None:
    tops = Counter(Path(name).parts[0] for name in wheel.namelist() if ".dist-info/" not in name)
    assert set(tops) == {"engine_cli", "engine_loader", "engine_registry"}
    for package, folder in (
        ("engine_registry", "registry"),
        ("engine_loader", "loader"),
        ("engine_cli", "cli"),
    ):
        here = {
            str(path.relative_to(ROOT / folder)) for path in (ROOT / folder / package).rglob("*.py")
        }
        assert here == {
            name
            for name in wheel.namelist()
            if name.startswith(f"{package}/") and name.endswith(".py")
        }
        assert f"{package}/py.typed" in wheel.namelist()


def test_a_wheel_has_one_command_a_plugin_for_each_engine_and_the_licence(
    wheel: zipfile.ZipFile,
) -> None:
    (info,) = {Path(name).parts[0] for name in wheel.namelist() if ".dist-info/" in name}
    entries = ConfigParser()
    entries.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    groups = {name: dict(entries[name]) for name in entries.sections()}
    assert groups.pop("console_scripts") == {"engines": "engine_cli.main:main"}
    assert "vllm.general_plugins" in groups
    for plugins in groups.values():
        assert list(plugins) == ["engine_registry"]
        module = plugins["engine_registry"].partition(":")[0].replace(".", "/")
        assert f"{module}/__init__.py" in wheel.namelist()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_metadata_is_valid_and_admits_the_pythons_that_a_release_is_tried_on(
    wheel: zipfile.ZipFile,
) -> None:
    (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
    metadata = Metadata.from_email(wheel.read(name), validate=True)
    assert metadata.requires_python is not None
    for minor in MINORS:
        assert f"3.{minor}.1" in metadata.requires_python
        assert f"Programming Language :: Python :: 3.{minor}" in (metadata.classifiers or [])
