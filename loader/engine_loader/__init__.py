"""Copies the weights of running engines from memory to memory, found through `engine_registry`.

A public name is imported from its module when it is first used: so this package is imported at
once, and its errors without torch.
"""

import logging
from typing import TYPE_CHECKING

from engine_registry.lazy import lazily

if TYPE_CHECKING:
    from engine_loader.adopting.adopt import adopt as adopt
    from engine_loader.adopting.adopted import Adopted as Adopted
    from engine_loader.adopting.finding import HeldRank as HeldRank
    from engine_loader.adopting.finding import find_held as find_held
    from engine_loader.artifacts.here import artifact_key_here as artifact_key_here
    from engine_loader.artifacts.pull import ArtifactReport as ArtifactReport
    from engine_loader.artifacts.pull import pull_artifact as pull_artifact
    from engine_loader.artifacts.push import publish_artifact as publish_artifact
    from engine_loader.caches import limit_caches as limit_caches
    from engine_loader.comparing.compare import compare as compare
    from engine_loader.comparing.comparison import Aspect as Aspect
    from engine_loader.comparing.comparison import Comparison as Comparison
    from engine_loader.comparing.comparison import Difference as Difference
    from engine_loader.comparing.comparison import Obstacle as Obstacle
    from engine_loader.engines.base import Engine as Engine
    from engine_loader.engines.cuda_ipc.engine import CudaIpcEngine as CudaIpcEngine
    from engine_loader.engines.in_process import InProcessEngine as InProcessEngine
    from engine_loader.engines.mooncake.engine import MooncakeEngine as MooncakeEngine
    from engine_loader.engines.opening import open_engine as open_engine
    from engine_loader.engines.sockets.credentials import SocketCredentials as SocketCredentials
    from engine_loader.engines.sockets.engine import SocketEngine as SocketEngine
    from engine_loader.errors import ArtifactInvalid as ArtifactInvalid
    from engine_loader.errors import Cancelled as Cancelled
    from engine_loader.errors import DeltaDamaged as DeltaDamaged
    from engine_loader.errors import DigestMismatch as DigestMismatch
    from engine_loader.errors import DigestsMissing as DigestsMissing
    from engine_loader.errors import EngineFailed as EngineFailed
    from engine_loader.errors import EngineUnavailable as EngineUnavailable
    from engine_loader.errors import HeldUnusable as HeldUnusable
    from engine_loader.errors import LoaderError as LoaderError
    from engine_loader.errors import MemoryInUse as MemoryInUse
    from engine_loader.errors import NoFreeSnapshot as NoFreeSnapshot
    from engine_loader.errors import ReadFailed as ReadFailed
    from engine_loader.errors import SnapshotsUnfit as SnapshotsUnfit
    from engine_loader.errors import SourceEvicted as SourceEvicted
    from engine_loader.errors import SourceLost as SourceLost
    from engine_loader.errors import SourceUnreachable as SourceUnreachable
    from engine_loader.errors import Stalled as Stalled
    from engine_loader.errors import TensorsUnusable as TensorsUnusable
    from engine_loader.errors import TornRead as TornRead
    from engine_loader.errors import VersionUnavailable as VersionUnavailable
    from engine_loader.errors import WeightsFileInvalid as WeightsFileInvalid
    from engine_loader.errors import WeightsMismatch as WeightsMismatch
    from engine_loader.files.whole_files import WholeFiles as WholeFiles
    from engine_loader.loading.catalogue import Catalogue as Catalogue
    from engine_loader.loading.catalogue import TensorSpec as TensorSpec
    from engine_loader.loading.catalogue import read_catalogue as read_catalogue
    from engine_loader.loading.checkpoint import EngineReader as EngineReader
    from engine_loader.loading.fetch import fetch as fetch
    from engine_loader.loading.full import load_full as load_full
    from engine_loader.loading.instance import load_instance as load_instance
    from engine_loader.loading.load import load as load
    from engine_loader.loading.module import load_module as load_module
    from engine_loader.loading.report import LoadReport as LoadReport
    from engine_loader.options import LoadOptions as LoadOptions
    from engine_loader.options import PublishOptions as PublishOptions
    from engine_loader.options import Snapshots as Snapshots
    from engine_loader.publishing.publication import Publication as Publication
    from engine_loader.publishing.publish import publish as publish
    from engine_loader.publishing.publish import publish_state_dict as publish_state_dict
    from engine_loader.publishing.replica import Replica as Replica
    from engine_loader.publishing.slots import snapshot_nbytes as snapshot_nbytes
    from engine_loader.starting.load_or_seed import load_or_seed as load_or_seed
    from engine_loader.starting.peers import find_peers as find_peers
    from engine_loader.starting.seeded import Seeded as Seeded
    from engine_loader.tensors.arena import Arena as Arena
    from engine_loader.tensors.arena import arena_of as arena_of
    from engine_loader.tensors.destination import Destination as Destination
    from engine_loader.tensors.shards import Shard as Shard
    from engine_loader.transfer.pace import Pace as Pace
    from engine_loader.transfer.progress import Progress as Progress

_MODULE_OF = {
    "Adopted": "adopting.adopted",
    "adopt": "adopting.adopt",
    "find_held": "adopting.finding",
    "HeldRank": "adopting.finding",
    "HeldUnusable": "errors",
    "Arena": "tensors.arena",
    "arena_of": "tensors.arena",
    "ArtifactInvalid": "errors",
    "ArtifactReport": "artifacts.pull",
    "Aspect": "comparing.comparison",
    "Cancelled": "errors",
    "Catalogue": "loading.catalogue",
    "Comparison": "comparing.comparison",
    "DeltaDamaged": "errors",
    "Destination": "tensors.destination",
    "Difference": "comparing.comparison",
    "DigestMismatch": "errors",
    "DigestsMissing": "errors",
    "Engine": "engines.base",
    "EngineFailed": "errors",
    "EngineReader": "loading.checkpoint",
    "EngineUnavailable": "errors",
    "InProcessEngine": "engines.in_process",
    "LoadOptions": "options",
    "LoadReport": "loading.report",
    "LoaderError": "errors",
    "MemoryInUse": "errors",
    "CudaIpcEngine": "engines.cuda_ipc.engine",
    "MooncakeEngine": "engines.mooncake.engine",
    "SocketCredentials": "engines.sockets.credentials",
    "SocketEngine": "engines.sockets.engine",
    "open_engine": "engines.opening",
    "Obstacle": "comparing.comparison",
    "NoFreeSnapshot": "errors",
    "Pace": "transfer.pace",
    "Progress": "transfer.progress",
    "Publication": "publishing.publication",
    "PublishOptions": "options",
    "ReadFailed": "errors",
    "Replica": "publishing.replica",
    "Seeded": "starting.seeded",
    "Shard": "tensors.shards",
    "Snapshots": "options",
    "SnapshotsUnfit": "errors",
    "SourceEvicted": "errors",
    "SourceLost": "errors",
    "SourceUnreachable": "errors",
    "Stalled": "errors",
    "TensorSpec": "loading.catalogue",
    "TensorsUnusable": "errors",
    "TornRead": "errors",
    "VersionUnavailable": "errors",
    "WeightsFileInvalid": "errors",
    "WeightsMismatch": "errors",
    "WholeFiles": "files.whole_files",
    "artifact_key_here": "artifacts.here",
    "compare": "comparing.compare",
    "fetch": "loading.fetch",
    "find_peers": "starting.peers",
    "load": "loading.load",
    "limit_caches": "caches",
    "load_full": "loading.full",
    "load_instance": "loading.instance",
    "load_module": "loading.module",
    "load_or_seed": "starting.load_or_seed",
    "publish": "publishing.publish",
    "publish_artifact": "artifacts.push",
    "publish_state_dict": "publishing.publish",
    "pull_artifact": "artifacts.pull",
    "read_catalogue": "loading.catalogue",
    "snapshot_nbytes": "publishing.slots",
}

__all__ = [*_MODULE_OF]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet until somebody listens

if not TYPE_CHECKING:  # to a type checker the names above are all that there are
    __getattr__, __dir__ = lazily(__name__, _MODULE_OF)
