"""The memory of a model whose tensors get other memory: an arena, or what a rank has left here.

All tensors that share memory come along, also those that nobody publishes. Where somebody else
refers to the memory, nothing is moved: it would go on with the old bytes. A kernel that only knows
an address cannot be seen, so the engine has not post-processed its weights yet. Used by
`integrations.starting`. Starts no thread.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine_loader.errors import EngineFailed, TensorsUnusable, listed
from engine_loader.integrations.tensors import all_tensors
from engine_loader.publishing.holding import check_can_be_held
from engine_loader.tensors.arena import arena_of, bound
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import is_dense, references
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


@dataclass
class _Follower:
    """A tensor that lies so many bytes behind the begin of another one."""

    tensor: torch.Tensor
    leader: torch.Tensor
    ahead_nbytes: int

    def follow(self) -> None:
        start = _start(self.leader) + self.ahead_nbytes
        offset, rest = divmod(start, self.tensor.itemsize)
        if rest:
            raise TensorsUnusable(
                f"a tensor of {self.tensor.dtype} cannot begin at byte {start} of its memory"
            )
        self.tensor.data = bound(self.leader.untyped_storage(), offset, self.tensor)


class Following:
    """Tensors of a module that come along when others get the memory that is held."""

    def __init__(self, rank: str, module: nn.Module) -> None:
        """`rank` names the rank in the log."""
        self._rank = rank
        self._module = module
        self._followers: list[_Follower] = []

    def may_adopt(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these may get other memory. Then `follow` comes after that. Else a warning says
        why.
        """
        try:
            self._prepare(tensors)
        except TensorsUnusable as exc:
            log.warning(
                "%s adopts no weights that are held here: %s",
                self._rank,
                exc,
                extra=fields("held_unusable", rank=self._rank, error=exc),
            )
            return False
        return True

    @plain_torch()
    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        blocks = _blocks_of(tensors, self._module)
        _refuse_hidden(blocks)
        problems: list[str] = []
        for block in blocks:
            for name, other in block.others.items():
                leader = next((one for one in block.tensors.values() if _covers(one, other)), None)
                if leader is None:
                    problems.append(name)
                    continue
                ahead = _start(other) - _start(leader)
                self._followers.append(_Follower(other, leader, ahead))
        if problems:
            raise TensorsUnusable(
                f"{len(problems)} tensors share memory with a part of what is published: "
                f"{listed(problems)}",
                problems=problems,
            )

    @plain_torch()
    def follow(self) -> None:
        """The others have got their memory."""
        for one in self._followers:
            one.follow()
        self._followers.clear()


def moved_into_arenas(
    rank: str, tensors: Mapping[str, torch.Tensor], module: nn.Module, required: bool
) -> bool:
    """Whether `move_into_arenas` has worked. Else a warning says why, or with `required` an error.

    `rank` names the rank in the log.
    """
    try:
        move_into_arenas(tensors, module)
    except (TensorsUnusable, EngineFailed) as exc:
        if required:
            raise
        log.warning(
            "%s does not leave its weights to the next process: %s",
            rank,
            exc,
            extra=fields("hold_refused", rank=rank, error=exc),
        )
        return False
    return True


@plain_torch()
def move_into_arenas(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    """Moves what a model publishes into arenas of its devices, unless it lies in such memory.

    Each storage is moved as a whole, so that all tensors are in it as they were. On a GPU its
    memory is free for the next one at once, but for views with gaps.

    Args:
        tensors: What is published, by name.
        module: The model, whose other tensors come along.

    Raises:
        TensorsUnusable: Somebody else refers to the memory; all tensors are as they were.
        EngineFailed: There is not so much memory. Some tensors may have been moved.
    """
    blocks = [block for block in _blocks_of(tensors, module) if not block.can_be_held()]
    _refuse_hidden(blocks)
    devices = dict.fromkeys(block.device for block in blocks)
    for device in devices:
        movable: list[torch.Tensor] = []
        followers: list[_Follower] = []
        for block in blocks:
            if block.device != device:
                continue
            own = [*block.tensors.values(), *block.others.values()]
            if all(is_dense(one) for one in own):
                movable += own
                continue
            whole = _whole(own[0])
            movable.append(whole)
            followers += [_Follower(one, whole, _start(one)) for one in own]
        arena_of(movable).close()
        for one in followers:
            one.follow()


class _Block:
    """A storage: the tensors in it that are published, and the others."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        self.tensors: dict[str, torch.Tensor] = {}
        self.others: dict[str, torch.Tensor] = {}

    def can_be_held(self) -> bool:
        name, tensor = next(iter(self.tensors.items()))
        try:
            check_can_be_held({name: tensor})
        except TensorsUnusable:
            return False
        return True

    def is_hidden(self) -> bool:
        """Whether anything but these tensors refers to the storage."""
        tensor = next(iter(self.tensors.values()))
        return references(tensor) > len(self.tensors) + len(self.others)


def _blocks_of(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> list[_Block]:
    blocks: dict[int, _Block] = {}
    seen: set[int] = set()
    for name, tensor in _with_memory(tensors.items(), seen):
        block = blocks.setdefault(tensor.untyped_storage().data_ptr(), _Block(tensor))
        block.tensors[name] = tensor
    for name, tensor in _with_memory(all_tensors(module), seen):
        if (found := blocks.get(tensor.untyped_storage().data_ptr())) is not None:
            found.others[name] = tensor
    return list(blocks.values())


def _with_memory(
    named: Iterable[tuple[str, torch.Tensor]], seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once, and that of which it is a view."""
    for name, tensor in named:
        for each in (tensor, tensor._base):
            if each is not None and each.numel() and not each.is_meta and id(each) not in seen:
                seen.add(id(each))
                yield name if each is tensor else f"{name}, as a whole", each


def _refuse_hidden(blocks: Iterable[_Block]) -> None:
    if not any(block.is_hidden() for block in blocks):
        return
    gc.collect()
    hidden = [name for block in blocks if block.is_hidden() for name in block.tensors]
    if hidden:
        raise TensorsUnusable(
            f"the memory of {len(hidden)} tensors is used by something that no tensor of the "
            f"model shows: {listed(hidden)}",
            problems=hidden,
        )


def _start(tensor: torch.Tensor) -> int:
    """Where it begins in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _end(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return _start(tensor) + tensor.itemsize * (1 + sum([(size - 1) * step for size, step in steps]))


def _covers(one: torch.Tensor, other: torch.Tensor) -> bool:
    return is_dense(one) and _start(one) <= _start(other) and _end(other) <= _end(one)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
