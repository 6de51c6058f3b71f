"""What sources have contributed is summed up by source, and their losses make one error."""

from __future__ import annotations

import pytest

from engine_loader import LoaderError, SourceLost, Stalled, TornRead
from engine_loader.transfer.shares import Share, loss_of, summed

LOST, STALLED, TORN = SourceLost("gone"), Stalled("silent"), TornRead("changed")


def test_a_source_has_one_share_with_all_its_bytes_and_its_last_error() -> None:
    shares = [Share("a", 3, TORN), Share("b", 5, TORN), Share("a", 4, LOST), Share("b", 1)]
    assert summed(shares) == (Share("a", 7, LOST), Share("b", 6, None))


def test_the_error_of_the_only_source_is_the_error_of_all() -> None:
    assert loss_of([Share("a"), Share("b", 1, TORN)]) is TORN


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([LOST, LOST], SourceLost),
        ([LOST, STALLED], Stalled),
        ([STALLED, TORN], TornRead),
        ([TORN, LOST, STALLED], TornRead),
    ],
)
def test_several_losses_are_one_error_that_names_all(
    errors: list[LoaderError], kind: type[LoaderError]
) -> None:
    shares = [Share(str(number), 0, error) for number, error in enumerate(errors)]
    loss = loss_of(shares)
    assert type(loss) is kind
    assert all(f"{number}: {error}" in str(loss) for number, error in enumerate(errors))
