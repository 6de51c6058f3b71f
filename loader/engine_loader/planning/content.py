"""Contents that follow from what is known: from digests, or from the contents of the ranks that are
read from. Pure.

Equal contents mean that tensors of one name, and one box of the whole, have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from engine_registry.schema.manifest import Manifest


def content_of(manifest: Manifest, digests: Mapping[str, bytes], algorithm: str) -> str:
    """128 bits as 32 hexadecimal digits: of all that the manifest says of the tensors but where
    they lie, and of their digests.

    `digests` has the digest of each tensor by its name, by that algorithm. Ranks on a GPU and on
    the host have different algorithms, and so different contents.
    """
    root = hashlib.blake2b(algorithm.encode(), digest_size=16)
    for name, described in _described(manifest):
        root.update(described)
        root.update(digests[name])
    return root.hexdigest()


def content_of_parts(contents: Sequence[str], dst: Manifest) -> str:
    """The content of tensors that are put together from all ranks of an instance, which have these
    contents, by rank.

    Every load of the same instance into the same layout has the same one.
    """
    root = hashlib.blake2b(json.dumps(list(contents)).encode(), digest_size=16)
    for _, described in _described(dst):
        root.update(described)
    return root.hexdigest()


def _described(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Each tensor by its name, and what it is, wherever it lies."""
    for entry in sorted(manifest.tensors, key=lambda entry: entry.name):
        box = None if entry.opaque else [entry.global_shape, entry.offsets]
        order = [] if entry.strides is None else [entry.strides]
        fused = [] if entry.slices is None else [{"slices": entry.slices}]
        yield (
            entry.name,
            json.dumps(
                [entry.name, entry.dtype, entry.shape, entry.nbytes, box, *order, *fused]
            ).encode(),
        )
