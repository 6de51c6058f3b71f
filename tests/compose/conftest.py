"""One daemon and its base images for the whole run; one project for each kind of compose, mended
after every test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compose.daemon import Docker, DockerMissing, a_docker
from tests.compose.project import ETCD, Project, composes
from tests.compose.stand_ins import base_images
from tests.support.waiting import wait_until

_COMPOSES = composes()


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A line that shows among the tests' results, whether they pass or not."""
    plugins: Any = request.config.pluginmanager

    def say(line: str) -> None:
        with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
            plugins.get_plugin("terminalreporter").write_line(f"  {line}")

    return say


@pytest.fixture(scope="session")
def docker(say: Callable[[str], None]) -> Iterator[Docker]:
    with tempfile.TemporaryDirectory(prefix="engines-docker-") as folder:
        try:
            with a_docker(Path(folder)) as docker:
                say(
                    "\nthe docker daemon: one of our own, for these tests"
                    if docker.own
                    else "\nthe docker daemon that runs here"
                )
                with base_images(docker, say):
                    yield docker
        except DockerMissing as exc:
            pytest.skip(str(exc))


@pytest.fixture(scope="session", params=_COMPOSES or [None])
def shared_project(
    request: pytest.FixtureRequest, docker: Docker, say: Callable[[str], None]
) -> Iterator[Project]:
    if request.param is None:
        pytest.skip(
            "there is neither `docker compose` nor `docker-compose`: `make test-compose` "
            "installs them"
        )
    project = Project(docker, _COMPOSES[request.param])
    say(f"compose {project.compose('version', '--short').strip()}, project {project.name}")
    try:
        project.build()
        project.up()
        yield project
    finally:
        project.remove()
        assert project.leftovers() == []


@pytest.fixture
def project(shared_project: Project) -> Iterator[Project]:
    """All of it is up and ready, before the test and after it, whatever the test has broken."""
    _mend(shared_project)
    yield shared_project
    _mend(shared_project)


def _mend(project: Project) -> None:
    for service in (*ETCD, "seed-0", "seed-1", "watcher"):
        if not project.is_running(service):
            project.start(service)
        if not project.is_connected(service):
            project.connect(service)
    wait_until(lambda: project.state() == "ready", timeout_s=60)
