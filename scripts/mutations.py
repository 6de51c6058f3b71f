"""Small changes of a module's source, each of which a test should notice. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(), ast.NotEq: ast.Eq(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(), ast.NotIn: ast.In(),
}  # fmt: skip
COMPUTED: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.FloorDiv(), ast.FloorDiv: ast.Mult(),
    ast.Div: ast.Mult(), ast.Mod: ast.FloorDiv(), ast.BitAnd: ast.BitOr(), ast.BitOr: ast.BitAnd(),
    ast.LShift: ast.RShift(), ast.RShift: ast.LShift(),
}  # fmt: skip
NOT_RUN = ("annotation", "returns", "decorator_list", "bases")  # or run once, before any test

Change = tuple[ast.expr | ast.stmt, str, str]  # what is replaced, what that is called, by what


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    kind: str
    source: str  # of the whole module
    removed: str
    added: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}\n-{self.removed}\n+{self.added}\n"


def mutants(path: str, source: str) -> Iterator[Mutant]:
    data = source.encode()  # columns are counted in bytes
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, kind, text in _changes(ast.parse(source)):
        last_line = node.end_lineno or node.lineno
        first, end = starts[node.lineno - 1], starts[last_line - 1] + (node.end_col_offset or 0)
        head, tail = data[first : first + node.col_offset], data[end : starts[last_line]]
        added = head + text.encode() + tail
        yield Mutant(
            path,
            node.lineno,
            kind,
            (data[:first] + added + data[starts[last_line] :]).decode(),
            data[first : starts[last_line]].decode().rstrip(),
            added.decode().rstrip(),
        )


def _changes(node: ast.AST) -> Iterator[Change]:
    """Types, logging and f-strings are left alone."""
    match node:
        case ast.JoinedStr() | ast.If(ast.Name("TYPE_CHECKING")):
            return
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("log")))):
            return
        case ast.stmt():
            yield from _of_statement(node)
        case ast.expr():
            yield from _of_expression(node)
    for test in _conditions(node):
        if not isinstance(test, ast.Compare | ast.UnaryOp):  # those are negated by themselves
            yield test, "negated condition", f"(not ({ast.unparse(test)}))"
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in NOT_RUN:
                yield from _changes(child)


def _of_statement(node: ast.stmt) -> Iterator[Change]:
    match node:
        case ast.Expr(ast.Constant()):
            pass  # a docstring
        case ast.Expr() | ast.Raise() | ast.Delete() | ast.Return(None) | ast.AugAssign():
            yield node, "deleted statement", "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield node, "deleted statement", "pass"
        case ast.Continue():
            yield node, "continue to break", "break"
        case ast.Break():
            yield node, "break to continue", "continue"
    match node:
        case ast.AugAssign(target, op, value) if type(op) in COMPUTED:
            other = ast.AugAssign(target, COMPUTED[type(op)], value)
            yield node, "other operator", ast.unparse(other)


def _of_expression(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.Compare(left, ops, rights):
            for index, op in enumerate(ops):
                others = [*ops[:index], COMPARED[type(op)], *ops[index + 1 :]]
                yield _put(node, "other comparison", ast.Compare(left, others, rights))
        case ast.BoolOp(op, values):
            other = ast.And() if isinstance(op, ast.Or) else ast.Or()
            yield _put(node, "and/or", ast.BoolOp(other, values))
        case ast.UnaryOp(ast.Not(), operand):
            yield _put(node, "no negation", operand)
        case ast.Constant(bool() as value):
            yield _put(node, "other constant", ast.Constant(not value))
        case ast.Constant(int() as value):
            yield _put(node, "other constant", ast.Constant(value + 1))
        case ast.BinOp(left, op, right) if type(op) in COMPUTED:
            yield _put(node, "other operator", ast.BinOp(left, COMPUTED[type(op)], right))
        case ast.Call(ast.Name("min" | "max")):
            pass  # the order of their arguments makes no difference
        case ast.Call(function, [first, second, *rest], keywords):
            if ast.Starred not in (type(first), type(second)):
                swapped = ast.Call(function, [second, first, *rest], keywords)
                yield _put(node, "swapped arguments", swapped)


def _put(node: ast.expr, kind: str, other: ast.expr) -> Change:
    text = ast.unparse(other)
    return node, kind, text if isinstance(other, ast.Constant | ast.Call) else f"({text})"


def _conditions(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.If() | ast.While() | ast.IfExp():
            return [node.test]
        case ast.comprehension():
            return node.ifs
    return []
