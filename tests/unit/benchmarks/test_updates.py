"""The parts of `python -m benchmarks.updates` that need no other process."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.updates import weights
from benchmarks.updates.candidates import TITLES, codec
from benchmarks.updates.report import goals, rows, tables
from benchmarks.updates.rounds import Sample
from tests.support.checkout import ROOT

GIB = 0.004


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1])
def test_a_step_changes_the_share_that_is_wanted_alike_in_each_process(share: float) -> None:
    tensors, others = weights.weights(GIB), weights.weights(GIB)
    weights.step(tensors, 3, share)
    changed = sum(
        int((tensor.view(torch.int16) != others[name].view(torch.int16)).sum())
        for name, tensor in tensors.items()
    )
    elements = weights.nbytes_of(tensors) // 2
    assert changed == pytest.approx(share * elements, rel=0.05)
    assert weights.wrong(others, tensors) > 150
    weights.step(others, 3, share)
    assert weights.wrong(others, tensors) == 0


def test_the_weights_are_200_tensors_of_nearly_the_size_that_is_wanted() -> None:
    tensors = weights.weights(0.02)
    assert len(tensors) == 200
    assert weights.nbytes_of(tensors) == pytest.approx(0.02 * (1 << 30), rel=0.1)


@pytest.mark.parametrize("library", [True, False])
def test_what_was_compressed_is_what_comes_out(
    library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(codec, "_ZSTD", None)
    data = bytearray(b"some weights " * 1000)
    packed = bytearray(codec.compress(memoryview(data)))
    assert len(packed) < len(data) / 10
    assert codec.decompress(packed, len(data)) == data


def test_ratios_are_medians_of_single_rounds_and_goals_without_figures_are_named() -> None:
    samples = [
        Sample(
            place="loopback",
            share=0.1,
            number=number,
            candidate=name,
            weights_nbytes=100,
            seconds=full * (0.5 if name == "delta" else 1),
            send_s=2.0,
            memcpy_s=1.0,
            sent_nbytes=0,
            peak_nbytes=0,
            load=1.0,
            reader={"nbytes": 10, "noticed_s": 0.1, "load_s": 0.2, "digest_s": 0.1},
        )
        for number, full in enumerate((1.0, 10.0, 3.0))
        for name in TITLES
    ]
    found = rows(samples)
    assert [one["candidate"] for one in found] == list(TITLES)
    assert (found[0]["to_full"], found[0]["seconds"]) == (0.5, 1.5)
    document = {"rows": found, "many": {}, "memory": {}, "codec": {}}
    document |= {"samples": [asdict(one) for one in samples]}
    assert all(goal["value"] is None for goal in goals(document))
    assert "| not measured |" in tables(document | {"goals": goals(document)})


def test_the_page_has_the_tables_of_the_newest_raw_values() -> None:
    newest = max((ROOT / "benchmarks/results").glob("*-updates.json"))
    page = (ROOT / "docs/explanation/update-figures.md").read_text()
    assert f"benchmarks/results/{newest.name}" in page
    assert tables(json.loads(newest.read_text())) in page
