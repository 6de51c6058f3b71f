"""A real browser before the real server and a real etcd. Only `make test-browser` runs these
tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from engine_cli.dashboard.server import Dashboard
from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from tests.integration.conftest import (  # noqa: F401  fixtures
    _no_keeper_is_left,
    _ports_of_this_worker,
    namespace,
    own_etcd,
    processes,
    registry,
    shared_etcd,
)
from tests.support.fleet import Fleet

WIDE, NARROW = (1600, 900), (400, 860)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "no chromium: `make test-browser` installs it"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def dashboard(registry: Registry) -> Iterator[Dashboard]:  # noqa: F811
    with Dashboard(registry, port=0) as dashboard:
        yield dashboard


@pytest.fixture
def fleet(registry: Registry) -> Iterator[Fleet]:  # noqa: F811
    etcd = Etcd(registry.config)
    yield Fleet(etcd)
    etcd.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address. A script that fails, or breaks the policy of the page, fails the test."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(url: str, size: tuple[int, int] = WIDE, scheme: Any = "light") -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        contexts.append(context)
        page: Any = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text)
                if said.type == "error" and "Failed to load resource" not in said.text
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
