"""The page of `engines dashboard` as people meet it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from engine_cli.dashboard.server import Dashboard
from engine_registry import ModelIdentity, RankState, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.browser.conftest import NARROW, WIDE
from tests.integration.conftest import Processes
from tests.support.fleet import Fleet, a_rank, a_ticket, ranks
from tests.support.ranks import register
from tests.support.waiting import wait_until

Opened = Callable[..., Page]
expect.set_options(timeout=30_000)


def test_a_rank_that_dies_changes_its_row(
    processes: Processes, dashboard: Dashboard, opened: Opened
) -> None:
    some = [processes.rank("q", rank, 2) for rank in range(2)]
    page = opened(dashboard.url)
    row = page.locator("tr.rank").nth(1)
    expect(row).to_contain_text("ready")
    some[1].kill()
    expect(row).to_contain_text("lost")
    expect(row).to_contain_text("process ended")
    expect(page.locator("tr.instance")).to_contain_text("incomplete")
    expect(page.locator("#list")).to_contain_text("q/1 lost: process ended")


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_a_chain_of_three_looks_like_a_chain(
    fleet: Fleet, dashboard: Dashboard, opened: Opened, size: tuple[int, int]
) -> None:
    source = a_rank("a")
    chain = [a_rank(name, state=RankState.LOADING) for name in "bc"]
    fleet.put([source, *chain])
    fleet.tickets([a_ticket(source, chain[0], 60, 100), a_ticket(chain[0], chain[1], 30, 100)])
    page = opened(dashboard.url, size)
    nodes = page.locator("#drawing .node")
    expect(nodes).to_have_count(3)
    expect(page.locator("#drawing .edge")).to_have_count(2)
    expect(nodes.nth(1)).to_contain_text("60 %")
    boxes: list[Any] = [nodes.nth(at).bounding_box() for at in range(3)]
    for one, other in itertools.pairwise(boxes):
        assert one["x"] < other["x"]
        assert (one["y"] == other["y"]) is (size is WIDE)
    assert boxes[2]["x"] + boxes[2]["width"] <= size[0]
    nodes.nth(2).press("Enter")
    expect(page.locator("#details")).to_contain_text("b/0")


def test_ten_thousand_ranks_are_few_rows_that_scroll_and_change(
    fleet: Fleet, dashboard: Dashboard, opened: Opened
) -> None:
    """How long the browser was busy at a stretch is printed: a machine's load is no failure."""
    some = ranks("big", 10_000)
    fleet.put(some)
    wait_until(lambda: dashboard.feed.record("big", 9_999) is not None)
    page = opened("about:blank")
    page.add_init_script(
        "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach("
        "(entry) => long.push(Math.round(entry.duration)))).observe({entryTypes: ['longtask']});"
    )
    page.goto(dashboard.url)
    expect(page.locator("#totals")).to_contain_text("10,000")
    page.get_by_role("button", name="Expand all").click()
    expect(page.get_by_role("button", name="Rank 0", exact=True)).to_be_visible()
    assert page.locator("#table tr").count() < 80
    print("\nlong tasks in ms, opening:", page.evaluate("long.splice(0)"))

    for at in range(20):
        page.evaluate(
            "(part) => { const all = document.getElementById('scroller');"
            "all.scrollTop = all.scrollHeight * part; }",
            at / 19,
        )
        fleet.put(replace(each, version=4 + at) for each in some[at * 500 : (at + 1) * 500])
        assert page.locator("#table tr").count() < 80
    last = page.locator("tr.rank").last
    expect(last).to_contain_text("Rank 9999")
    expect(last.locator(".version")).to_have_text("23")
    print("long tasks in ms, scrolling and changing:", page.evaluate("long.splice(0)"))

    page.get_by_label("Filter by").fill("node-1250")
    expect(page.locator("tr.rank")).to_have_count(8)
    page.get_by_label("Filter by").fill("")
    page.locator("#scroller").focus()
    page.keyboard.press("End")
    expect(page.get_by_role("button", name="Rank 9999")).to_be_focused()
    print("long tasks in ms, filtering:", page.evaluate("long.splice(0)"))


def test_hostile_text_is_shown_and_does_not_run(
    fleet: Fleet, dashboard: Dashboard, opened: Opened
) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    source = a_rank("a", model=ModelIdentity(hostile), host=hostile, device=hostile)
    fleet.put([source])
    fleet.tickets([a_ticket(source, hostile, 1, 2)])
    page = opened(dashboard.url)
    expect(page.locator("tr.model")).to_contain_text(hostile)
    expect(page.locator("#drawing .node")).to_have_count(2)
    page.get_by_role("button", name="Rank 0", exact=True).click()
    expect(page.locator("#facts")).to_contain_text(hostile)
    assert page.locator("main img, main script, #details img, #details script").count() == 0
    assert page.title() == "Engines"


def test_the_page_asks_for_the_token_until_it_is_the_right_one(
    registry: Registry, opened: Opened
) -> None:
    with Dashboard(registry, port=0, token="s3cret") as guarded, register(registry, "a"):
        page = opened(guarded.url)
        for token in ("wrong", "s3cret"):
            page.locator("#token").fill(token)
            page.get_by_role("button", name="Open").click()
            if token == "wrong":
                expect(page.locator("#login-note")).to_contain_text("not the token")
        expect(page.locator("tr.instance")).to_contain_text("ready")
        page.reload()
        expect(page.locator("tr.instance")).to_contain_text("ready")


def test_all_of_it_can_be_reached_by_keyboard(
    fleet: Fleet, dashboard: Dashboard, opened: Opened
) -> None:
    fleet.put(ranks("a", 2))
    page = opened(dashboard.url)
    expect(page.locator("tr.rank")).to_have_count(2)
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.locator("#scroller").focus()
    page.keyboard.press("ArrowDown")
    instance = page.get_by_role("button", name="a", exact=True)
    expect(instance).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("tr.rank")).to_have_count(0)
    page.keyboard.press("ArrowRight")
    expect(page.locator("tr.rank")).to_have_count(2)
    page.keyboard.press("End")
    rank = page.get_by_role("button", name="Rank 1")
    expect(rank).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="a rank 1")).to_be_visible()
    page.keyboard.press("Escape")
    expect(rank).to_be_focused()


def test_the_filter_takes_words_and_a_state(
    fleet: Fleet, dashboard: Dashboard, opened: Opened
) -> None:
    fleet.put([*ranks("alpha", 9), *ranks("beta", 1, state=RankState.UPDATING)])
    page = opened(dashboard.url)
    expect(page.locator("tr.rank")).to_have_count(10)
    page.get_by_label("Filter by").fill("alpha node-2")
    expect(page.locator("tr.rank")).to_have_count(1)
    expect(page.locator("#found")).to_have_text("1 of 2 instances")
    page.get_by_label("Filter by").fill("")
    page.get_by_label("State", exact=True).select_option("updating")
    expect(page.locator("tr.instance")).to_have_count(1)
    expect(page.locator("tr.instance")).to_contain_text("beta")
    page.get_by_label("Filter by").fill("alpha")
    expect(page.locator("#empty")).to_be_visible()


def test_instances_are_found_by_their_labels_which_are_shown(
    fleet: Fleet, dashboard: Dashboard, opened: Opened
) -> None:
    labels = {"tier": "gold", "team": "search"}
    fleet.put([*ranks("alpha", 1, labels=labels), *ranks("beta", 1, labels={"team": "ads"})])
    page = opened(dashboard.url)
    page.get_by_label("Filter by").fill("team=search tier=gold")
    expect(page.locator("tr.instance")).to_have_count(1)
    expect(page.locator("tr.instance .note")).to_have_text("team=search, tier=gold")
    page.get_by_role("button", name="Rank 0", exact=True).click()
    expect(page.locator("#facts")).to_contain_text("team=search, tier=gold")


def test_the_tensors_of_a_rank_are_shown_on_request(
    registry: Registry, dashboard: Dashboard, opened: Opened
) -> None:
    with register(registry, "a"):
        page = opened(dashboard.url)
        page.get_by_role("button", name="Rank 0", exact=True).click()
        page.get_by_role("button", name="Show tensors").click()
        expect(page.locator("#tensors-table tbody")).to_contain_text("float32")
        expect(page.locator("#tensors-note")).to_have_text("1 tensor.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, (1100, 800), (761, 800), NARROW])
def test_nothing_is_wider_than_the_screen(
    fleet: Fleet, dashboard: Dashboard, opened: Opened, size: tuple[int, int], scheme: str
) -> None:
    long = "a" * 128
    source, reader = a_rank(long, host=long), a_rank(f"{'b' * 128}", state=RankState.LOADING)
    fleet.put([source, reader])
    fleet.tickets([a_ticket(source, reader, 1, 2)])
    page = opened(dashboard.url, size, scheme)
    expect(page.locator("#drawing .node")).to_have_count(2)
    expect(page.locator("tr.rank")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert page.evaluate("document.getElementById('scroller').scrollWidth") <= size[0]


def test_a_dashboard_that_is_away_is_shown_and_tried_again(
    registry: Registry, opened: Opened
) -> None:
    with register(registry, "a"):
        with Dashboard(registry, port=0) as first:
            page = opened(first.url)
            expect(page.locator("tr.instance")).to_contain_text("ready")
        expect(page.locator("#link")).to_contain_text("lost")
        expect(page.locator("tr.instance")).to_contain_text("ready")
        with Dashboard(registry, port=first.port):
            expect(page.locator("#link")).to_have_text("Live")


def test_an_etcd_that_is_away_is_shown_and_comes_back_by_itself(
    own_etcd: LocalEtcd, opened: Opened
) -> None:
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        register(registry, "a"),
        Dashboard(registry, port=0) as dashboard,
    ):
        page = opened(dashboard.url)
        expect(page.locator("tr.instance")).to_contain_text("ready")
        own_etcd.kill()
        expect(page.locator("#notice")).to_contain_text("etcd cannot be reached since")
        own_etcd.start()
        expect(page.locator("#notice")).to_be_hidden()
