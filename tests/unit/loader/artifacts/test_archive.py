"""Archives of folders: the same bytes for the same files, and nothing outside of the folder for
hostile ones.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.artifacts import packing, unpacking
from engine_loader.artifacts.archive import File
from engine_loader.artifacts.packing import pack
from engine_loader.artifacts.unpacking import Unpacked, unpack
from engine_loader.errors import ArtifactInvalid, Cancelled
from engine_registry import failpoints

Content = Mapping[tuple[str, ...], tuple[bytes, bool]]
AtTheMove = Callable[[Callable[[], object]], None]
_PARTS = st.sampled_from(["a", "b", "c0", "é", " ", "a.b", "a-b", "-", "…", ".lock", "B"])


def _fits(content: Content) -> bool:
    """No path is that of a file and of a folder."""
    return not any(path[:n] in content for path in content for n in range(1, len(path)))


CONTENTS = st.dictionaries(
    st.lists(_PARTS, min_size=1, max_size=3).map(tuple),
    st.tuples(st.binary(max_size=40), st.booleans()),
    min_size=1,
    max_size=8,
).filter(_fits)


def make(folder: Path, content: Content) -> None:
    for parts, (data, executable) in content.items():
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if executable else 0o640)


def content_of(folder: Path) -> Content:
    return {
        path.relative_to(folder).parts: (path.read_bytes(), bool(path.stat().st_mode & 0o100))
        for path in folder.rglob("*")
        if path.is_file()
    }


def packed(folder: Path) -> memoryview:
    return pack(folder).numpy().data


@pytest.fixture
def archive(tmp_path: Path) -> memoryview:
    """Of `one`, `sub/two` and `sub/three`."""
    folder = tmp_path / "made"
    make(
        folder,
        {("one",): (b"1", False), ("sub", "two"): (b"22", True), ("sub", "three"): (b"", False)},
    )
    return packed(folder)


@pytest.fixture
def at_the_move() -> Iterator[AtTheMove]:
    """Sets what happens when all files are written and none is moved yet."""
    yield lambda action: failpoints.ACTIONS.update({"artifact.written": action})
    failpoints.ACTIONS.pop("artifact.written", None)


# -- the same bytes


@given(CONTENTS)
def test_what_is_packed_comes_out_again_and_packs_to_the_same_bytes(content: Content) -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        make(Path(one), content)
        archive = packed(Path(one))
        assert unpack(archive, Path(two)) == Unpacked(new=len(content))
        assert content_of(Path(two)) == content
        assert packed(Path(two)) == archive
        assert unpack(archive, Path(two)) == Unpacked(unchanged=len(content))


@given(CONTENTS, st.randoms())
def test_order_times_and_folders_without_files_do_not_matter(
    content: Content, random: Random
) -> None:
    shuffled = list(content.items())
    random.shuffle(shuffled)
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        make(Path(one), content)
        make(Path(two), dict(shuffled))
        Path(two, "empty", "folders").mkdir(parents=True)
        for path in Path(two).rglob("*"):
            os.utime(path, (1, 1))
        assert packed(Path(one)) == packed(Path(two))


@given(CONTENTS, CONTENTS)
def test_other_files_have_other_bytes(one: Content, two: Content) -> None:
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        make(Path(first), one)
        make(Path(second), two)
        assert (packed(Path(first)) == packed(Path(second))) == (one == two)


# -- what no artifact can hold


@pytest.mark.parametrize("target", ["/etc/passwd", "one", "nothing"])
def test_links_are_refused_by_name(tmp_path: Path, target: str) -> None:
    make(tmp_path, {("one",): (b"1", False)})
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ArtifactInvalid, match=r"no artifact can hold .*/link: it is a link"):
        pack(tmp_path)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactInvalid, match=r"/pipe: it is neither a file nor a folder"):
        pack(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).touch()
    with pytest.raises(ArtifactInvalid, match="the name is no text"):
        pack(tmp_path)


@pytest.mark.parametrize("folder", [".", "empty"])
def test_a_folder_without_files_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ArtifactInvalid, match="there are no files in"):
        pack(tmp_path / folder)


def test_a_folder_that_is_not_there_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in {"nothing": "No such file", "file": "Not a directory"}.items():
        with pytest.raises(ArtifactInvalid, match=f"cannot read .*/{name}: {reason}"):
            pack(tmp_path / name)


def test_only_the_named_paths_are_packed_and_no_hidden_folder(tmp_path: Path) -> None:
    some: Content = {("one",): (b"1", False), ("sub", "x", "two"): (b"2", True)}
    other: Content = {("three",): (b"", False), ("sub", "y"): (b"", False)}
    hidden: Content = {(".host.abcdefgh.partial", "x"): (b"", False)}
    make(tmp_path, {**some, **other, **hidden})
    unpack(pack(tmp_path, only=("one", "sub/x", "nothing")).numpy().data, tmp_path / "out")
    assert content_of(tmp_path / "out") == some


def test_a_file_that_goes_and_one_that_grows_meanwhile_begin_the_packing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {("gone",): (b"1", False), ("grown",): (b"2", False)})
    read, disturbances = packing._read, [(tmp_path / "gone").unlink, grow(tmp_path / "grown")]

    def read_late(path: Path, memory: memoryview, file: File) -> None:
        if disturbances:
            disturbances.pop()()
        read(path, memory, file)

    monkeypatch.setattr(packing, "_read", read_late)
    archive = packed(tmp_path)
    assert unpack(archive, tmp_path / "out") == Unpacked(new=1)
    assert content_of(tmp_path / "out") == {("grown",): (b"22", False)}


def test_a_file_that_always_changes_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {("log",): (b"1", False)})
    read = packing._read

    def read_late(path: Path, memory: memoryview, file: File) -> None:
        grow(path)()
        read(path, memory, file)

    monkeypatch.setattr(packing, "_read", read_late)
    with pytest.raises(ArtifactInvalid, match=r"/log changes while it is read, 5 times now"):
        pack(tmp_path)


def grow(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes() + b"2")


# -- hostile archives


def archive_of(files: object, data: bytes = b"", magic: bytes = b"ENGARCH1") -> memoryview:
    index = json.dumps({"files": files}).encode()
    return memoryview(magic + len(index).to_bytes(8, "little") + index + data)


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (archive_of([["/etc/x", 0, False]]), "the path is absolute"),
        (archive_of([["../x", 0, False]]), r"the path has the part '\.\.'"),
        (archive_of([["a/../../x", 0, False]]), r"the path has the part '\.\.'"),
        (archive_of([["./x", 0, False]]), r"the path has the part '\.'"),
        (archive_of([["a//x", 0, False]]), "the path has the part ''"),
        (archive_of([["", 0, False]]), "the path has the part ''"),
        (archive_of([["a/", 0, False]]), "the path has the part ''"),
        (archive_of([["a\0b", 0, False]]), "the name is no text"),
        (archive_of([["x" * 256, 0, False]]), "more than 255 bytes"),
        (archive_of([["x/" * 1500 + "x", 0, False]]), "more than 2048 bytes"),
        (archive_of([["x/" * 64 + "x", 0, False]]), "more than 64 parts"),
        (archive_of([["b", 0, False], ["a", 0, False]]), "'a' stands after 'b'"),
        (archive_of([["a", 0, False], ["a", 0, False]]), "'a' stands after 'a'"),
        (archive_of([["a", 0, False], ["a/b", 0, False]]), "'a' is a file and a folder"),
        (archive_of([["a", 5, False]], b"1234"), "its index speaks of"),
        (archive_of([["a", 5, False]], b"123456"), "its index speaks of"),
        (archive_of([["a", 1 << 62, False], ["b", 1 << 62, False]]), "its index speaks of"),
        (archive_of([["a", -1, False]]), "the index of the archive is damaged"),
        (archive_of([["a", 0, False, "link"]], b"x"), "damaged"),
        (archive_of([["a", "0", False]]), "the index of the archive is damaged"),
        (archive_of([]), "the index of the archive is damaged"),
        (archive_of({}), "the index of the archive is damaged"),
        (archive_of([["a", 0, False]], magic=b"ENGARCH2"), "does not begin as archives do"),
        (memoryview(b""), "does not begin as archives do"),
        (memoryview(b"ENGARCH1" + b"\xff" * 8), "its index cannot have"),
        (memoryview(b"ENGARCH1" + (9).to_bytes(8, "little") + b"{"), "its index cannot have"),
        (memoryview(b"ENGARCH1" + (1).to_bytes(8, "little") + b"{"), "it is not JSON"),
    ],
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, hostile: memoryview, reason: str
) -> None:
    with pytest.raises(ArtifactInvalid, match=reason):
        unpack(hostile, tmp_path / "in" / "here")
    assert list(tmp_path.rglob("*")) == []


@given(st.data())
def test_a_damaged_archive_is_refused_or_stays_within_its_folder(data: st.DataObject) -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        make(Path(one), {("a",): (b"12", False), ("b", "c"): (b"3", True)})
        archive = bytearray(packed(Path(one)))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(archive) - 1))
            archive[at] = data.draw(st.integers(0, 255))
        target = Path(two, "target")
        try:
            unpack(memoryview(archive), target)
        except ArtifactInvalid:
            assert not target.exists()
        assert set(os.listdir(two)) <= {"target"}
        assert all(stat.S_IMODE(path.stat().st_mode) < 0o1000 for path in target.rglob("*"))


# -- into a folder in which others write


def test_files_that_are_there_stay(tmp_path: Path, archive: memoryview) -> None:
    theirs: Content = {
        ("one",): (b"other", False),
        ("sub", "two"): (b"22", False),
        ("sub", "x"): (b"x", True),
    }
    make(tmp_path / "out", theirs)
    assert unpack(archive, tmp_path / "out") == Unpacked(new=1, unchanged=1, kept=1)
    assert content_of(tmp_path / "out") == {**theirs, ("sub", "three"): (b"", False)}


def test_nothing_is_written_through_a_link_or_over_what_is_no_folder(
    tmp_path: Path, archive: memoryview
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "one").symlink_to(elsewhere / "new")
    (out / "sub").symlink_to(elsewhere)
    assert unpack(archive, out) == Unpacked(kept=3)
    assert list(elsewhere.iterdir()) == []
    (out / "sub").unlink()
    (out / "sub").touch()
    assert unpack(archive, out) == Unpacked(kept=3)


def test_what_comes_while_the_files_are_written_stays(
    tmp_path: Path, archive: memoryview, at_the_move: AtTheMove
) -> None:
    theirs: Content = {("one",): (b"1", True), ("sub", "two"): (b"other", False)}
    at_the_move(lambda: make(tmp_path / "out", theirs))
    assert unpack(archive, tmp_path / "out") == Unpacked(new=1, unchanged=1, kept=1)
    assert content_of(tmp_path / "out") == {**theirs, ("sub", "three"): (b"", False)}


def test_before_the_move_nobody_sees_a_file(
    tmp_path: Path, archive: memoryview, at_the_move: AtTheMove
) -> None:
    seen: list[str] = []

    def look() -> None:
        seen.extend(path.name for path in (tmp_path / "out").iterdir())
        raise Cancelled("enough")

    at_the_move(look)
    with pytest.raises(Cancelled):
        unpack(archive, tmp_path / "out")
    (name,) = seen
    assert name.endswith(".partial")
    assert not (tmp_path / "out").exists()


def test_a_check_that_raises_ends_it_and_leaves_nothing(
    tmp_path: Path, archive: memoryview
) -> None:
    def check() -> None:
        if any(path.name == "one" for path in tmp_path.rglob("*")):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        unpack(archive, tmp_path / "out", check)
    assert list(tmp_path.glob("out*")) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, archive: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unpacking, "_write", full)
    with pytest.raises(ArtifactInvalid, match=r"cannot write .*/out: No space left on device"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, archive: memoryview) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactInvalid, match=r"cannot write .*/file/out: Not a directory"):
        unpack(archive, tmp_path / "file" / "out")


def test_files_get_the_modes_of_the_user(tmp_path: Path, archive: memoryview) -> None:
    before = os.umask(0o027)
    try:
        unpack(archive, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("out/**/*")}
    assert (modes["one"], modes["two"]) == (0o640, 0o750)
