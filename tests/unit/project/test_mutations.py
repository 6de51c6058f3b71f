from __future__ import annotations

from scripts.mutations import mutants

SOURCE = '''"""A module."""

def first(some: list[int] | None = None) -> int | None:
    """What é it does."""
    if not some or 1 < len(some) <= 9:
        log.info("%s is %d", some, 1)
        return
    for each in some:
        self.é[each] = find(each, other); self.total += 2
        if each is None: continue
    raise ValueError(f"{1 + 1}")
'''


def changed() -> list[tuple[int, str, str]]:
    return [(each.line, each.kind, each.added.strip()) for each in mutants("m.py", SOURCE)]


def test_each_operator_condition_constant_argument_and_statement_is_changed_by_itself() -> None:
    assert sorted(changed()) == [
        (5, "and/or", "if (not some and 1 < len(some) <= 9):"),
        (5, "negated condition", "if (not (not some or 1 < len(some) <= 9)):"),
        (5, "no negation", "if (some) or 1 < len(some) <= 9:"),
        (5, "other comparison", "if not some or (1 < len(some) < 9):"),
        (5, "other comparison", "if not some or (1 <= len(some) <= 9):"),
        (5, "other constant", "if not some or 1 < len(some) <= 10:"),
        (5, "other constant", "if not some or 2 < len(some) <= 9:"),
        (7, "deleted statement", "pass"),
        (9, "deleted statement", "pass; self.total += 2"),
        (9, "deleted statement", "self.é[each] = find(each, other); pass"),
        (9, "other constant", "self.é[each] = find(each, other); self.total += 3"),
        (9, "other operator", "self.é[each] = find(each, other); self.total -= 2"),
        (9, "swapped arguments", "self.é[each] = find(other, each); self.total += 2"),
        (10, "continue to break", "if each is None: break"),
        (10, "other comparison", "if (each is not None): continue"),
        (11, "deleted statement", "pass"),
    ]


def test_a_change_leaves_all_other_lines_as_they_are() -> None:
    lines = SOURCE.splitlines()
    for each in mutants("m.py", SOURCE):
        found = each.source.splitlines()
        assert found[: each.line - 1] == lines[: each.line - 1]
        assert found[each.line :] == lines[each.line :]
        assert (each.removed, each.added) == (lines[each.line - 1], found[each.line - 1])
        compile(each.source, "m.py", "exec")
