"""Tables and trees: in a pipe one row a line, on a narrow terminal folded, and never cut."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.cells import cell_len

from engine_cli.render.tables import RowPrinter, print_json, print_table, print_tree, size

COLUMNS = ("INSTANCE", "STATE", "SIZE", "WHY NOT READY")
ROWS = [
    ["llama", "ready", "34.9 MB", ""],
    ["qwen-3-8b", "degraded", "17.4 MB", "missing rank 1 of 2; rank 0 updating"],
]
CONTROLS = "\x1b[2J\r\n\t\x00\x7f\x9b\u202e\udcff"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (90_900_000, "90.9 MB"),
        (8.6e9, "8.6 GB"),
        (1e12, "1.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes_have_units(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_a_table_cuts_nothing_and_gives_each_row_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "x" * 500
    print_table(("A", "B"), [[long, "1"], ["[bold]", ":smile:"]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [["A", "B"], [long, "1"], ["[bold]", ":smile:"]]


def test_no_control_character_of_a_name_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(("TENSOR",), [[f"w{CONTROLS}w"]])
    print_json({"name": CONTROLS})
    table, data = capsys.readouterr().out.split("\n", 1)[1].splitlines()
    assert table.strip() == "w\\x1b[2J\\r\\n\\t\\x00\\x7f\\x9b\\u202e\\udcffw"
    assert data.isascii()
    assert data.isprintable()
    assert json.loads(data) == {"name": CONTROLS}


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """One of so many columns, which takes no colours."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")


def test_a_table_in_a_pipe_has_one_row_a_line_and_no_blanks_at_its_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "INSTANCE   STATE     SIZE     WHY NOT READY",
        "llama      ready     34.9 MB",
        "qwen-3-8b  degraded  17.4 MB  missing rank 1 of 2; rank 0 updating",
    ]


def test_the_last_column_is_wrapped_where_there_is_room_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, 60)
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "INSTANCE   STATE     SIZE     WHY NOT READY",
        "llama      ready     34.9 MB",
        "qwen-3-8b  degraded  17.4 MB  missing rank 1 of 2; rank 0",
        "                              updating",
    ]


def test_columns_that_do_not_fit_go_on_below(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, 40)
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "INSTANCE   STATE     SIZE",
        "  WHY NOT READY",
        "llama      ready     34.9 MB",
        "qwen-3-8b  degraded  17.4 MB",
        "  missing rank 1 of 2; rank 0 updating",
    ]


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80])
def test_no_line_is_wider_than_the_terminal_and_no_character_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    on_terminal(monkeypatch, columns)
    rows = [["x" * 128, "ready", "重" * 30, "y" * 70], *ROWS]
    print_table(COLUMNS, rows)
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= max(20, columns)
    assert Counter("".join(out.split())) == Counter(
        "".join("".join(map("".join, [COLUMNS, *rows])).split())
    )
    assert not any(line != line.rstrip() or not line for line in out.splitlines())


@pytest.mark.parametrize(
    ("column", "cell", "colour"),
    [
        ("STATUS", "fail", "\x1b[1;31mfail\x1b[0m"),
        ("STATUS", "warn", "\x1b[33mwarn\x1b[0m"),
        ("STATE", "degraded", "\x1b[31mdegraded\x1b[0m"),
        ("STATE", "loading 37 %", "\x1b[36mloading 37 %\x1b[0m"),
        ("MODEL", "fail", "fail"),
    ],
)
def test_states_are_coloured_on_a_terminal(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    cell: str,
    colour: str,
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table((column,), [[cell]])
    assert capsys.readouterr().out.splitlines() == [f"\x1b[1m{column}\x1b[0m", colour]


@pytest.mark.parametrize(("tty", "no_color"), [(False, ""), (False, "1"), (True, "1")])
def test_nothing_is_coloured_in_a_pipe_or_with_no_color(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tty: bool, no_color: str
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    monkeypatch.setenv("NO_COLOR", no_color)
    print_table(("STATUS",), [["fail"], ["warn"]])
    assert capsys.readouterr().out == "STATUS\nfail\nwarn\n"


def test_a_tree_on_a_narrow_terminal_stays_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, 20)
    print_tree([(0, "a"), (1, "b" * 20), (1, "c")])
    assert capsys.readouterr().out.splitlines() == [
        "a",
        f"├── {'b' * 16}",
        f"│   {'b' * 4}",
        "└── c",
    ]


def test_a_tree_is_moved_to_the_right_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_tree([(0, "a"), (1, "b\x1b[2J"), (2, "c"), (1, "d" * 500), (0, "e")])
    assert capsys.readouterr().out == f"a\n  b\\x1b[2J\n    c\n  {'d' * 500}\ne\n"


def test_a_tree_has_branches_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_tree([(0, "a"), (1, "[b]"), (2, "c"), (1, "d"), (0, "e")])
    assert capsys.readouterr().out.splitlines() == [
        "a",
        "├── [b]",
        "│   └── c",
        "└── d",
        "e",
    ]


def test_rows_that_come_bit_by_bit_keep_their_columns(capsys: pytest.CaptureFixture[str]) -> None:
    printer = RowPrinter()
    printer.print(("A", "B"), [["long-one", "x"]])
    printer.print(("A", "B"), [["s", "y"], ["a-still-longer-one", "z"]])
    printer.print(("A", "B"), [["t", "y"]])
    printer.print(("A", "C"), [["t", "y"]])
    assert capsys.readouterr().out.splitlines() == [
        "A         B",
        "long-one  x",
        "s                   y",
        "a-still-longer-one  z",
        "t                   y",
        "A  C",
        "t  y",
    ]
