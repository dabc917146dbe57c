"""Mutants of a module: every place where one small change of the source might be a fault that nobody would see."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OTHER: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
TWINS = {"min": "max", "max": "min", "sorted": "list", "any": "all", "all": "any"}
QUIET = ("log.", "progress(", "warnings.")
"""How calls begin that only tell somebody something."""


@dataclass(frozen=True)
class Site:
    """One change of one place: `start` to `end` (bytes of the source) become `text`."""

    kind: str
    line: int
    start: int
    end: int
    text: str

    def applied(self, source: bytes) -> bytes:
        """Return the source with the change."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def sites(source: str) -> list[Site]:
    """Return every change of a module's source that compiles."""
    found = []
    for site in _Finder(source).found():
        changed = site.applied(source.encode())
        try:
            compile(changed, "mutant", "exec")
        except SyntaxError:
            continue
        if changed != source.encode():
            found.append(site)
    return found


class _Finder:
    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        lines = source.encode().splitlines(keepends=True)
        self.begins = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]
        self.source = source.encode()
        self.outside = set(self._outside())

    def found(self) -> Iterator[Site]:
        for node in ast.walk(self.tree):
            if node in self.outside or not hasattr(node, "lineno"):
                continue
            for kind, place, text in self._changes(node):
                start, end = self._span(place)
                yield Site(kind, place.lineno, start, end, text)

    def _changes(self, node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            flipped = ast.Compare(node.left, [FLIPPED[type(node.ops[0])]()], node.comparators)
            yield "comparison", node, f"({ast.unparse(flipped)})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield "truth", node, str(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            for step in (1, -1):
                yield "constant", node, f"({node.value + step})"
        elif isinstance(node, ast.BoolOp):
            other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            yield "and/or", node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
        elif isinstance(node, ast.BinOp) and type(node.op) in OTHER:
            yield "arithmetic", node, f"({ast.unparse(ast.BinOp(node.left, OTHER[type(node.op)](), node.right))})"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield "sign", node, ast.unparse(node.operand)
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield "condition", node.test, f"(not ({ast.unparse(node.test)}))"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if not ast.unparse(node.value).startswith(QUIET):
                yield "dropped call", node, "pass"
        elif isinstance(node, ast.Raise):
            yield "dropped raise", node, "pass"
        elif isinstance(node, ast.With) and len(node.items) == 1:
            if node.items[0].optional_vars is None and "lock" in ast.unparse(node.items[0].context_expr):
                yield "dropped lock", node.items[0].context_expr, "__import__('contextlib').nullcontext()"
        elif isinstance(node, ast.Dict) and len(node.keys) > 1:
            yield from self._without_keys(node)
        elif isinstance(node, ast.Call):
            yield from self._other_calls(node)
        elif isinstance(node, ast.FunctionDef):
            yield from self._early(node)

    def _without_keys(self, node: ast.Dict) -> Iterator[tuple[str, ast.expr, str]]:
        for left in range(len(node.keys)):
            keys, values = ([*part[:left], *part[left + 1 :]] for part in (node.keys, node.values))
            yield "removed key", node, ast.unparse(ast.Dict(keys, values))

    def _other_calls(self, node: ast.Call) -> Iterator[tuple[str, ast.expr, str]]:
        name = ast.unparse(node.func)
        if name.startswith(QUIET):
            return
        if isinstance(node.func, ast.Name) and node.func.id in TWINS:
            yield "other function", node.func, TWINS[node.func.id]
        if len(node.args) >= 2 and not any(isinstance(given, ast.Starred) for given in node.args[:2]):
            first, second, *rest = node.args
            yield "swapped arguments", node, ast.unparse(ast.Call(node.func, [second, first, *rest], node.keywords))
        for left in range(len(node.keywords)):
            keywords = [*node.keywords[:left], *node.keywords[left + 1 :]]
            yield "dropped argument", node, ast.unparse(ast.Call(node.func, node.args, keywords))

    def _early(self, node: ast.FunctionDef) -> Iterator[tuple[str, ast.stmt, str]]:
        body = node.body[1:] if ast.get_docstring(node, clean=False) else node.body
        if len(body) > 1 and not isinstance(body[0], (ast.FunctionDef, ast.ClassDef)):
            yield "early return", body[0], f"return None\n{' ' * body[0].col_offset}pass"

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.begins[node.lineno - 1] + node.col_offset, self.begins[node.end_lineno - 1] + node.end_col_offset

    def _outside(self) -> Iterator[ast.AST]:
        """Yield what no change is made in: annotations, decorators, texts of errors and logs, protocols."""
        for node in ast.walk(self.tree):
            for part in _passed_over(node):
                yield from ast.walk(part)


def _passed_over(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef):
        given = node.args
        every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
        notes = [node.returns, *(argument.annotation for argument in every if argument)]
        whole = [node] if node.name == "__repr__" else []
        return [*whole, *(note for note in notes if note is not None), *node.decorator_list]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    whole_too = (
        isinstance(node, (ast.JoinedStr, ast.Assert))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("log.", "logging.")))
        or (isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    )
    return [node] if whole_too else []
