"""Whether mirrors fit into the memory of their hosts."""

from __future__ import annotations

import pytest

from engine_loader.loading.mirror import fits_memory


@pytest.mark.parametrize(
    ("offers", "fits"),
    [
        ([("a", 20)], True),
        ([("a", 19)], False),
        ([("a", None)], True),  # it is not known
        ([("a", 40), ("a", 40)], True),
        ([("a", 40), ("a", 39)], False),
        ([("a", 40), ("a", None)], True),
        ([("a", 30), ("a", None)], False),
        ([("a", 20), ("b", 20)], True),
        ([("a", 100), ("b", 10)], False),
        ([], True),
    ],
)
def test_mirrors_take_half_of_what_is_available_on_each_host(
    offers: list[tuple[str, int | None]], fits: bool
) -> None:
    assert fits_memory(10, offers) is fits
