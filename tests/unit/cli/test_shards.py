"""`--shard` and `--shards` of `engines register`: what they say of each tensor, and what is wrong
with them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_cli.shards import Placement, boxes_of, parse_cut, read_boxes
from engine_registry.errors import InvalidField

SHAPES = {"a.q": (4, 6), "a.o": (4, 6), "norm": (6,), "scale": ()}
WHOLE = {
    "a.q": Placement((4, 6), (0, 0)),
    "a.o": Placement((4, 6), (0, 0)),
    "norm": Placement((6,), (0,)),
    "scale": Placement((), ()),
}


def boxes(
    *cuts: str,
    places: dict[str, tuple[int, int]] | None = None,
    listed: dict[str, Placement] | None = None,
    whole: bool = False,
) -> dict[str, Placement]:
    """On rank 1 of 3."""
    return boxes_of(
        SHAPES, [parse_cut(text, places or {}, 1, 3) for text in cuts], listed or {}, whole=whole
    )


# -- slices
# --------------------------------------------------------------------------------------------------


def test_what_nothing_is_said_of_says_nothing() -> None:
    assert boxes() == {}


def test_whole_tensors_are_their_own_boxes() -> None:
    assert boxes(whole=True) == WHOLE


def test_without_a_topology_a_slice_is_that_of_the_rank() -> None:
    assert boxes("a.q:0") == {**WHOLE, "a.q": Placement((12, 6), (4, 0))}


def test_with_tensor_parallelism_a_slice_is_that_of_the_place_there() -> None:
    assert boxes("a.q:0", places={"tp": (1, 2), "pp": (0, 3)})["a.q"] == Placement((8, 6), (4, 0))
    assert boxes("a.q:0", places={"pp": (0, 3)})["a.q"] == Placement((12, 6), (4, 0))


def test_a_slice_may_be_over_another_axis() -> None:
    assert boxes("a.q:0:ep", places={"tp": (1, 2), "ep": (3, 4)})["a.q"] == Placement(
        (16, 6), (12, 0)
    )


def test_a_pattern_matches_several_tensors_and_a_dimension_counts_from_the_end_too() -> None:
    assert boxes("a.*:-1") == {
        **WHOLE,
        "a.q": Placement((4, 18), (0, 6)),
        "a.o": Placement((4, 18), (0, 6)),
    }


def test_patterns_heed_case_and_may_hold_colons_and_classes() -> None:
    cut = parse_cut("layer:[0-9]:w:1", {}, 0, 2)
    assert (cut.pattern, cut.dim) == ("layer:[0-9]:w", 1)
    with pytest.raises(InvalidField, match="matches none"):
        boxes("A.q:0")


def test_a_tensor_may_be_cut_along_two_dimensions_over_two_axes() -> None:
    assert boxes("a.q:0:ep", "*.q:1", places={"tp": (1, 2), "ep": (3, 4)})["a.q"] == Placement(
        (16, 12), (12, 6)
    )


def test_the_same_twice_is_once() -> None:
    assert boxes("a.q:0", "a.q:0") == boxes("a.q:0")


@pytest.mark.parametrize(
    "text", ["", "w", "w:", "w:x", ":0", "w:0:", "w:\N{ARABIC-INDIC DIGIT ZERO}", "w:1.5", "w:0x1"]
)
def test_what_is_no_pattern_and_dimension_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="use PATTERN:DIM or PATTERN:DIM:AXIS"):
        parse_cut(text, {"": (0, 1)}, 0, 1)


@pytest.mark.parametrize(
    ("places", "known"), [({}, "is not given"), ({"tp": (0, 2), "pp": (0, 1)}, "has tp, pp")]
)
def test_an_axis_that_the_topology_lacks_is_refused(
    places: dict[str, tuple[int, int]], known: str
) -> None:
    with pytest.raises(
        InvalidField,
        match=f"over the axis 'ep', but --topology {known}: add --topology ep=INDEX/SIZE",
    ):
        parse_cut("w:0:ep", places, 0, 1)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["b.*:0"], r"--shard 'b\.\*:0' matches none of the 4 tensors \(the first is 'a\.q'\)"),
        (["a.q:2"], r"does not fit tensor 'a\.q' of shape \[4, 6\]: DIM is from -2 to 1"),
        (["a.q:-3"], r"does not fit tensor 'a\.q' of shape \[4, 6\]: DIM is from -2 to 1"),
        (["*:0"], "does not fit tensor 'scale' of shape .*: it has no dimensions"),
        (
            ["a.q:0", "a.*:-2"],
            r"tensor 'a\.q' is cut twice along dimension 0, "
            r"by --shard 'a\.q:0' and --shard 'a\.\*:-2'",
        ),
        (
            ["a.q:0", "a.*:1"],
            r"tensor 'a\.q' is cut twice over all ranks, by --shard 'a\.q:0' and --shard 'a\.\*:1'",
        ),
    ],
)
def test_slices_that_do_not_fit_the_tensors_are_refused(cuts: list[str], message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        boxes(*cuts)


def test_a_pattern_for_a_rank_without_tensors_is_refused() -> None:
    with pytest.raises(InvalidField, match="matches none of the 0 tensors: correct PATTERN"):
        boxes_of({}, [parse_cut("w:0", {}, 0, 1)], {}, whole=False)


# -- boxes from a file
# --------------------------------------------------------------------------------------------------


def listed(tmp_path: Path, text: str) -> dict[str, Placement]:
    (tmp_path / "boxes.json").write_text(text)
    return read_boxes(tmp_path / "boxes.json")


def test_a_file_gives_the_boxes_of_some_tensors_and_the_others_are_whole(tmp_path: Path) -> None:
    found = listed(
        tmp_path,
        '{"a.q": {"global_shape": [11, 6], "offsets": [7, 0]}, "scale": {"global_shape": [], '
        '"offsets": []}}',
    )
    assert found == {"a.q": Placement((11, 6), (7, 0)), "scale": Placement((), ())}
    assert boxes(listed=found) == {**WHOLE, "a.q": Placement((11, 6), (7, 0))}
    assert boxes("a.o:1", listed=found) == {
        **WHOLE,
        "a.q": Placement((11, 6), (7, 0)),
        "a.o": Placement((4, 18), (0, 6)),
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"w"', "delimiter"),
        ("\udcff", "codec can't decode|invalid"),
        ("[]", "it is no object"),
        ("[" * 100_000, "recursion"),
        ('{"w": []}', "'w' does not have the fields global_shape and offsets"),
        ('{"w": {"global_shape": [1]}}', "'w' does not have the fields"),
        ('{"w": {"global_shape": [1], "offsets": [0], "shape": [1]}}', "and no others"),
        (
            '{"w": {"global_shape": 1, "offsets": [0]}}',
            "global_shape of 'w' is no list of natural numbers",
        ),
        ('{"w": {"global_shape": [1], "offsets": [-1]}}', "offsets of 'w' is no list"),
        ('{"w": {"global_shape": [1], "offsets": [true]}}', "offsets of 'w' is no list"),
        ('{"w": {"global_shape": [1.0], "offsets": [0]}}', "global_shape of 'w' is no list"),
        (
            '{"w": {"global_shape": [1], "offsets": [0]}, "w": {"global_shape": [1], '
            '"offsets": [0]}}',
            "'w' is there twice",
        ),
    ],
    ids=lambda text: text[:40],
)
def test_a_file_that_holds_no_boxes_is_refused_with_how_it_should_look(
    tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "boxes.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidField, match=rf'boxes\.json is not as \{{"TENSOR": .*({why})'):
        read_boxes(tmp_path / "boxes.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="cannot be read: No such file or directory"):
        read_boxes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "box", "message"),
    [
        ("b", Placement((1,), (0,)), "--shards has the tensor 'b', which --weights lacks"),
        (
            "a.q",
            Placement((4, 6), (1, 0)),
            r"tensor 'a\.q' at \[1, 0\] of \[4, 6\]: its shape \[4, 6\] does not fit in there",
        ),
        ("a.q", Placement((24,), (0,)), "does not fit in there"),
        ("a.q", Placement((4, 6), (0,)), "does not fit in there"),
    ],
)
def test_boxes_that_do_not_fit_the_tensors_are_refused(
    name: str, box: Placement, message: str
) -> None:
    with pytest.raises(InvalidField, match=message):
        boxes(listed={name: box})


def test_a_tensor_is_named_by_one_option_only() -> None:
    with pytest.raises(
        InvalidField,
        match=r"tensor 'a\.q' is in --shards and matches --shard 'a\.\*:0': say it once",
    ):
        boxes("a.*:0", listed={"a.q": Placement((8, 6), (0, 0))})
