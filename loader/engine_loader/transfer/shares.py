"""What each source has contributed to a transfer, and why sources were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine_loader.engines.nearness import Nearness
from engine_loader.errors import LoaderError, SourceLost, Stalled, TornRead


@dataclass
class Share:
    """What one source has contributed; `error` is why it was dropped, if it was, and `near` is how
    near it is.
    """

    name: str
    nbytes: int = 0
    error: LoaderError | None = None
    near: Nearness = Nearness.UNKNOWN


def summed(shares: Sequence[Share]) -> tuple[Share, ...]:
    """One for each source, with what it brought in all and why it was dropped in the end."""
    by_name: dict[str, Share] = {}
    for share in shares:
        before = by_name.get(share.name, share)
        by_name[share.name] = (
            share if before is share else replace(share, nbytes=before.nbytes + share.nbytes)
        )
    return tuple(by_name.values())


def loss_of(shares: Sequence[Share]) -> LoaderError:
    """Why a transfer has no source left: the error of the only one that was dropped, or one error
    that names all.
    """
    errors = [share.error for share in shares if share.error is not None]
    if len(errors) == 1:
        return errors[0]
    kind = next(
        (kind for kind in (TornRead, Stalled) if any(isinstance(error, kind) for error in errors)),
        SourceLost,
    )
    return kind(
        "; ".join(f"{share.name}: {share.error}" for share in shares if share.error is not None)
    )
