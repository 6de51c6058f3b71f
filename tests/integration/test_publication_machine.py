"""Publications that are updated, paused, replaced, interrupted, drained, evicted, closed and read,
in any order: hypothesis steps through them.

A reader looks after every step. It gets the words that the publication vouches for, in its version,
or an error of ours; and what a publication leaves when it is closed is nothing, however it came to
that.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine_loader import InProcessEngine, LoaderError, Publication, PublishOptions, load, publish
from engine_loader.errors import MemoryInUse, TensorsUnusable
from engine_loader.tensors.uses import USES
from engine_registry import ModelIdentity, Registry, RegistryError
from engine_registry.schema.manifest import Region
from tests.support.launches import Origin, origins, the_origin, words
from tests.support.waiting import wait_until

COUNT = 512
MODEL = ModelIdentity("m")


class Interrupting(InProcessEngine):
    """Ctrl-C comes as often as is wanted when memory is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupts = 0

    def unregister(self, region: Region) -> None:
        super().unregister(region)
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt


class PublicationMachine(RuleBasedStateMachine):
    registry: Registry  # set by the test
    names = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.engine = Interrupting()
        self.stack.callback(self.engine.close)
        self.instance = f"i{next(self.names)}"
        self.launch = 0
        self.tensors = {"w": words(Origin(), COUNT)}
        self.publication: Publication | None = None
        self.open: list[Publication] = []  # that nobody has closed yet
        self.vouched: Origin | None = None  # what a reader must get, if anything
        self.listed = False  # in etcd
        self.paused = False
        self.doubted = False  # an update has failed
        self.before: Origin | None = None  # what was vouched for when it was paused

    # -- what happens
    # ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.publication is None)
    @rule(digests=st.booleans())
    def publish(self, digests: bool) -> None:
        self.launch += 1
        self._write(Origin(self.launch, 0))
        self.publication = publish(
            self.registry,
            self.engine,
            instance=self.instance,
            rank=0,
            world_size=1,
            tensors=self.tensors,
            model=MODEL,
            options=PublishOptions(digests=digests, ttl_s=2.0),
        )
        self.open.append(self.publication)
        self.vouched, self.listed = Origin(self.launch, 0), True
        self.doubted = False

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule()
    def update(self) -> None:
        publication = self._publication
        origin = Origin(self.launch, publication.record.version + 1)
        with publication.update():
            self._write(origin)
        self.vouched, self.doubted = origin, False

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule(kind=st.sampled_from([ZeroDivisionError, KeyboardInterrupt]))
    def an_update_fails_half_way(self, kind: type[BaseException]) -> None:
        with pytest.raises(kind), self._publication.update():  # noqa: PT012
            self.tensors["w"][: COUNT // 2] = words(Origin(99), COUNT // 2)
            raise kind
        self.vouched, self.doubted = None, True

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule()
    def an_update_moves_the_weights(self) -> None:
        before = self.tensors["w"].data
        with pytest.raises(TensorsUnusable), self._publication.update():
            self.tensors["w"].data = before * 2
        self.tensors["w"].data = before
        self.vouched, self.doubted = None, True

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule()
    def an_update_is_begun_twice(self) -> None:
        publication, before = self._publication, self._publication.record.version
        with publication.update():
            with pytest.raises(LoaderError, match="being updated already"), publication.update():
                pass
            self._write(Origin(self.launch, before + 1))
        self.vouched, self.doubted = Origin(self.launch, before + 1), False

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule()
    def it_is_closed_in_the_middle_of_an_update(self) -> None:
        with self._publication.update():
            self._write(Origin(99))
            self._publication.close()
        self._is_closed()

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule(interrupts=st.integers(0, 1))
    def it_is_paused(self, interrupts: int) -> None:
        self.engine.interrupts = interrupts
        for _ in range(interrupts):
            with pytest.raises(KeyboardInterrupt):
                self._publication.pause()
            with pytest.raises(LoaderError, match="is paused"), self._publication.update():
                pass
        self._publication.pause()
        self.paused, self.before, self.vouched = True, self.vouched, None
        self.tensors["w"].zero_()

    @precondition(lambda self: self.paused)
    @rule()
    def a_change_that_makes_no_sense_is_tried_while_it_is_paused(self) -> None:
        with pytest.raises(LoaderError, match="is paused"):
            self._publication.pause()
        with pytest.raises(LoaderError, match="is paused"), self._publication.update():
            pass

    @precondition(lambda self: self.paused)
    @rule()
    def it_is_resumed_with_other_memory(self) -> None:
        before = self.tensors["w"].data
        self.tensors["w"].data = before.clone()
        with pytest.raises((LoaderError, RegistryError)):
            self._publication.resume()
        self.tensors["w"].data = before

    @precondition(lambda self: self.paused)
    @rule()
    def it_is_resumed(self) -> None:
        """With the bytes that it had."""
        origin = self.before or Origin(99)
        self._write(origin)
        if self._may_be_offered() and not self.doubted:
            self._publication.resume()
            self.paused, self.vouched = False, self.before
        else:
            with pytest.raises((LoaderError, RegistryError)):
                self._publication.resume()
            self.tensors["w"].zero_()

    @precondition(lambda self: self.publication is not None)
    @rule()
    def it_is_replaced(self) -> None:
        origin = Origin(self.launch, self._publication.version + 1)
        other = {"w": words(origin, COUNT)}
        if self._may_be_offered():
            self._publication.replace(other)
            self.tensors = other
            self.paused, self.doubted, self.vouched = False, False, origin
        else:
            with pytest.raises(RegistryError):
                self._publication.replace(other)

    @precondition(lambda self: self.publication is not None and not self.paused)
    @rule()
    def it_is_replaced_by_what_cannot_be_published(self) -> None:
        with pytest.raises(TensorsUnusable):
            self._publication.replace({"w": torch.zeros(4, 4)[:, 1]})

    @precondition(lambda self: self.vouched is not None)
    @rule()
    def somebody_loads_into_it(self) -> None:
        with pytest.raises(MemoryInUse):
            load(
                self.registry,
                InProcessEngine(),
                self.instance,
                rank=0,
                tensors=self.tensors,
                timeout_s=0.0,
            )

    @precondition(lambda self: self.publication is not None and self.listed)
    @rule()
    def it_is_evicted(self) -> None:
        (record,) = self.registry.ranks(self.instance)
        assert self.registry.evict(record)
        self.listed = False

    @precondition(lambda self: self.publication is not None)
    @rule()
    def it_is_drained(self) -> None:
        assert self._publication.drain(0.5)
        self._is_closed()

    @precondition(lambda self: self.publication is not None)
    @rule(interrupts=st.integers(0, 3))
    def it_is_closed(self, interrupts: int) -> None:
        self.engine.interrupts = interrupts
        for _ in range(4):
            with suppress(KeyboardInterrupt):
                self._publication.close()
        self.engine.interrupts = 0
        self._is_closed()

    @precondition(lambda self: self.publication is None and self.open)
    @rule()
    def it_is_used_after_its_end(self) -> None:
        closed = self.open[-1]
        closed.close()
        with pytest.raises(LoaderError, match="is closed"), closed.update():
            pass

    # -- what always holds
    # ----------------------------------------------------------------------------------------------

    @invariant()
    def a_reader_gets_what_is_vouched_for_or_an_error(self) -> None:
        found = {"w": torch.zeros(COUNT, dtype=torch.int64)}
        try:
            report = load(
                self.registry,
                InProcessEngine(),
                self.instance,
                rank=0,
                tensors=found,
                timeout_s=0.0,
            )
        except (LoaderError, RegistryError):
            assert self.vouched is None or not self.listed
        else:
            assert the_origin(origins(found["w"])) == self.vouched
            assert self.vouched is not None
            assert report.version == self.vouched.version
            assert report.content == self._publication.record.content

    @invariant()
    def what_is_closed_has_left_nothing(self) -> None:
        if self.publication is None:
            assert not list(self.engine._served)
            assert self.registry.ranks(self.instance) == ()
            with USES.fill(
                "the test", [(self.tensors["w"].data_ptr(), self.tensors["w"].data_ptr() + 8)]
            ):
                pass
            for closed in self.open:
                assert closed._header.read() is None

    def teardown(self) -> None:
        if self.publication is not None:
            self.publication.close()
        self.stack.close()

    @property
    def _publication(self) -> Publication:
        assert self.publication is not None
        return self.publication

    def _is_closed(self) -> None:
        self.publication, self.vouched, self.listed = None, None, False
        self.paused = False

    def _may_be_offered(self) -> bool:
        """An evicted rank learns of it some time, and is refused if it comes first."""
        if not self.listed:
            wait_until(lambda: self._publication.registration.lost is not None)
        return self.listed

    def _write(self, origin: Origin) -> None:
        self.tensors["w"].copy_(words(origin, COUNT))


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_no_order_of_events_makes_a_publication_serve_a_wrong_byte_or_leave_anything(
    registry: Registry,
) -> None:
    machine: Any = type("Machine", (PublicationMachine,), {"registry": registry})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
