"""What a load did, or how far it came. Made by `load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine_loader.errors import Cancelled, LoaderError
from engine_loader.planning.reads import Span, payload_of
from engine_loader.publishing.publication import Publication
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share, summed
from engine_registry import RankRecord


@dataclass(frozen=True)
class Filled:
    """What an attempt did that has filled the tensors. `record` is of the source that brought the
    most.
    """

    record: RankRecord
    spans: Sequence[Span]  # of the whole load, without what was there already
    skipped_nbytes: int  # of the tensors: they were there already
    shares: Sequence[Share]  # of this attempt
    transfer_s: float
    digest_s: float
    verified: bool  # by digests
    outlived: Sequence[str]  # keys of sources whose process has ended meanwhile
    within_host: Sequence[str]  # keys of sources that were read without the network
    contents: Sequence[str]  # of the sources, without ranks that have another content


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        instance: The instance that brought the most bytes.
        rank: The rank that was loaded. None if it is not known.
        version: The version of the weights.
        content: The content of the tensors now, as 32 hexadecimal digits. Loads with equal contents
            have brought the same bytes.
        protocol: How the bytes were read.
        tensors: How many tensors were filled.
        nbytes: Bytes of the tensors.
        read_nbytes: Bytes that were read for them. They may be more where that was quicker.
        skipped_nbytes: Bytes of the tensors that were not read, because digests of the sources
            prove that they were there already. Only with `LoadOptions.reuse` or `base`.
        delta_nbytes: Bytes of deltas that were read. What they changed is part of `skipped_nbytes`.
        lent: Bytes of the tensors that ranks with other contents brought, by their keys in etcd.
            Digests of the sources prove them. Only with `LoadOptions.also_from`.
        contents: The contents of the ranks that it was loaded from, for `LoadOptions.base` of a
            later load.
        reads: How many reads the plan had.
        retries: How often the load began again because the weights had changed.
        seconds: Seconds of the whole load.
        transfer_s: Seconds of the reads with their checks.
        digest_s: Seconds that digests took besides: before the reads with `LoadOptions.reuse`, and
            after them.
        regions: Regions of memory that the tensors lie in.
        register_s: Seconds that the transfer engine took to make these known to the network card.
            They are part of `seconds`. Over tcp they are next to nothing.
        shares: For each rank that was read from, the bytes that came from it, how near it is, and
            why it was dropped, if it was. They include tables of digests.
        verified: Whether digests of the sources prove every tensor, rather than the header alone.
        outlived: The sources that were read to the end although their process had ended: their keys
            in etcd. Only where memory is mapped, as over cuda_ipc.
        within_host: The sources on this host whose memory was read without the network: their keys
            in etcd. Over cuda_ipc and nvlink_intra these are all.
        publication: The loaded rank as a source, if it was to be published. The caller closes it.
    """

    instance: str
    rank: int | None
    version: int
    content: str
    protocol: str
    tensors: int
    nbytes: int
    read_nbytes: int
    reads: int
    retries: int
    seconds: float
    transfer_s: float
    digest_s: float
    shares: tuple[Share, ...]
    skipped_nbytes: int = 0
    delta_nbytes: int = 0
    lent: Mapping[str, int] = field(default_factory=dict)
    contents: tuple[str, ...] = ()
    regions: int = 0
    register_s: float = 0.0
    verified: bool = False
    outlived: tuple[str, ...] = ()
    within_host: tuple[str, ...] = ()
    publication: Publication | None = field(default=None, compare=False, repr=False)

    @property
    def lent_nbytes(self) -> int:
        """Bytes of the tensors that ranks with other contents brought."""
        return sum(self.lent.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes of the tensors in 10^9 for each second of the whole load."""
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, object]:
        """For a log line."""
        names = (
            "instance",
            "rank",
            "version",
            "content",
            "protocol",
            "tensors",
            "nbytes",
            "retries",
        )
        shares = [share for share in self.shares if share.nbytes]
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 6),
            "sources": [share.name for share in shares],
            "near": [share.near.value for share in shares],
            **({"skipped_nbytes": self.skipped_nbytes} if self.skipped_nbytes else {}),
            **({"delta_nbytes": self.delta_nbytes} if self.delta_nbytes else {}),
            **({"lent_nbytes": self.lent_nbytes} if self.lent else {}),
            **({"outlived": list(self.outlived)} if self.outlived else {}),
            **({"within_host": list(self.within_host)} if self.within_host else {}),
        }


def report_of(
    filled: Filled,
    received: Received,
    rank: int | None,
    retries: int,
    took_s: float,
    publication: Publication | None,
) -> LoadReport:
    """Of a load whose last attempt is `filled`. `received` has the content and what came before."""
    record = filled.record
    return LoadReport(
        instance=record.instance,
        rank=rank,
        version=record.version,
        content=received.content,
        protocol=record.protocol,
        tensors=len(received.dst.tensors),
        nbytes=payload_of(filled.spans) + filled.skipped_nbytes,
        read_nbytes=sum(span.read_nbytes for span in filled.spans),
        reads=len(filled.spans),
        retries=retries,
        seconds=took_s,
        transfer_s=filled.transfer_s,
        digest_s=filled.digest_s,
        shares=summed([*received.shares, *filled.shares]),
        skipped_nbytes=filled.skipped_nbytes,
        delta_nbytes=received.delta_nbytes,
        lent=received.lent,
        contents=tuple(filled.contents),
        regions=len(received.dst.regions),
        verified=filled.verified,
        outlived=tuple(filled.outlived),
        within_host=tuple(filled.within_host),
        publication=publication,
    )


def with_what_came(
    exc: LoaderError, sources: Sequence[SourceRank], received: Received
) -> LoaderError:
    """The error of an attempt with what the caller may want to know: which sources, and which of
    the tensors are whole.
    """
    arrivals, dst = received.arrivals, received.dst
    complete = arrivals.complete() if arrivals.nbytes else []
    held = (
        f"{arrivals.nbytes} of {dst.nbytes} bytes have come, {len(complete)} of "
        f"{len(dst.tensors)} tensors are whole"
    )
    keys = [source.record.key for source in sources]
    what = (
        exc.what
        if isinstance(exc, Cancelled)
        else f"{' and '.join(keys)} could not be read to the end ({exc.what})"
    )
    return type(exc)(
        f"{what}; {held if arrivals.nbytes else 'no tensor is usable'}",
        exc.remedy or "load again, or from another instance",
        key=keys[0],
        sources=keys,
        complete=complete,
    )
