"""What a chat template may consist of to be compiled: nothing by which it could say something new beyond the proof.

A template that reads the date passes every probe of one day, and one that counts to a thousand every probe of fewer
messages. So its syntax is compared with a list, and the proof goes beyond every number that it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from jinja2 import nodes

__all__ = ["MAX_NUMBERS", "refusal", "texts_of"]

# All whole numbers of a template together: no sum of them reaches a message, or a character, beyond those of the proof.
MAX_NUMBERS = 64

_FUNCTIONS = frozenset({"namespace", "raise_exception", "range", "dict"})
_METHODS = frozenset({"split", "strip", "lstrip", "rstrip", "startswith", "endswith", "items", "keys", "values", "get"})
_FILTERS = frozenset(
    {"trim", "length", "count", "string", "tojson", "default", "d", "safe", "first", "last", "list", "items", "join"}
)
_COUNTS = frozenset({"length", "count"})
_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "number", "true", "false"}
    | {"in", "eq", "equalto", "==", "ne", "!=", "sameas"}
)
_NODES: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Break, nodes.Continue),
    *(nodes.Assign, nodes.AssignBlock, nodes.NSRef, nodes.Macro, nodes.CallBlock, nodes.ExtensionAttribute),
    *(nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call, nodes.Keyword, nodes.Filter),
    *(nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr),
    *(nodes.Add, nodes.Sub, nodes.Mod, nodes.Neg, nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
)
_OF_A_MESSAGE = frozenset({"role", "content"})  # what messages of plain conversations have


def refusal(tree: nodes.Template) -> str | None:
    """What a template holds that isn't on the list; None: all is.

    Args:
        tree: as the runtime parses it.
    """
    return next(_refusals(tree), None)


def texts_of(tree: nodes.Template) -> list[str]:
    """The texts that a template may compare with: its constants, and those that it joins of constants."""
    found = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    for node in tree.find_all((nodes.Add, nodes.Concat)):
        try:
            value = node.as_const()
        except nodes.Impossible:
            continue
        if isinstance(value, str):
            found.add(value)
    return sorted(found - {""})


def _refusals(tree: nodes.Template) -> Iterator[str]:
    for node in _walk(tree):
        if type(node) not in _NODES:
            yield f"it has {_named(node)}"
    # What nobody gives is empty whenever it is rendered. `strftime_now` is given beside the environment's own.
    given = {"strftime_now", *(tree.environment.globals if tree.environment else ())} - _FUNCTIONS
    for name in sorted({node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"} & given):
        yield f"it reads {name}"
    for node in tree.find_all(nodes.Filter):
        if node.name not in _FILTERS:
            yield f"it has the filter {node.name}"
    for test in tree.find_all(nodes.Test):
        if test.name not in _TESTS:
            yield f"it has the test {test.name}"
    yield from _calls(tree)
    lists = _lists(tree)
    for node in tree.find_all(nodes.Filter):
        if node.name in _COUNTS and not _has_no_content(node.node, lists):
            yield "it reads the length of something else than messages"
    yield from _numbers(tree)


def _calls(tree: nodes.Template) -> Iterator[str]:
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        function = call.node
        if isinstance(function, nodes.Getattr):
            if function.attr not in _METHODS:
                yield f"it calls {function.attr}()"
        elif isinstance(function, nodes.Name):
            if function.name not in _FUNCTIONS | macros | {"caller"}:
                yield f"it calls {function.name}()"
        elif not isinstance(function, nodes.ExtensionAttribute):
            yield "it calls what an expression gives"


def _numbers(tree: nodes.Template) -> Iterator[str]:
    values = [node.value for node in tree.find_all(nodes.Const)]
    if any(isinstance(value, float | complex) for value in values):
        yield "it has a number that isn't whole"
    total = sum(abs(value) for value in values if isinstance(value, int) and not isinstance(value, bool))
    if total > MAX_NUMBERS:
        yield f"its numbers are more than {MAX_NUMBERS} together"


def _lists(tree: nodes.Template) -> set[str]:
    """Names that only ever stand for messages, or some of them."""
    assigned: dict[str, list[nodes.Node | None]] = {}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            assigned.setdefault(node.target.name, []).append(node.node)
    for name in _bound(tree):
        assigned.setdefault(name, []).append(None)
    lists = {"messages", *assigned}
    while True:
        lost = {name for name in lists for value in assigned.get(name, ()) if not _is_list(value, lists)}
        if not lost & lists:
            return lists
        lists -= lost


def _bound(tree: nodes.Template) -> Iterable[str]:
    """Names that loops, macros and blocks bind."""
    for node in tree.find_all((nodes.For, nodes.AssignBlock)):
        target = node.target  # type: ignore[attr-defined]  # both have one
        yield from (name.name for name in [target, *target.find_all(nodes.Name)] if isinstance(name, nodes.Name))
    for assign in tree.find_all(nodes.Assign):
        if not isinstance(assign.target, nodes.Name):
            yield from (name.name for name in assign.target.find_all(nodes.Name))
    for macro in tree.find_all(nodes.Macro):
        yield from (argument.name for argument in macro.args)


def _is_list(value: nodes.Node | None, lists: Collection[str]) -> bool:
    if isinstance(value, nodes.Name):
        return value.name in lists
    if isinstance(value, nodes.Getitem):
        return isinstance(value.arg, nodes.Slice) and _is_list(value.node, lists)
    if isinstance(value, nodes.Filter):
        return value.name == "list" and _is_list(value.node, lists)
    return False


def _has_no_content(value: nodes.Node | None, lists: Collection[str]) -> bool:
    """Whether it is messages, or an entry that messages of plain conversations lack: `message.tool_calls`."""
    if isinstance(value, nodes.Getattr):
        return value.attr not in _OF_A_MESSAGE
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const) and isinstance(value.arg.value, str):
        return value.arg.value not in _OF_A_MESSAGE
    if isinstance(value, nodes.Name) and value.name in ("tools", "documents"):
        return True
    return _is_list(value, lists)


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    left: list[nodes.Node] = [node]
    while left:
        node = left.pop()
        yield node
        left += node.iter_child_nodes()


def _named(node: nodes.Node) -> str:
    return {"Mul": "a multiplication", "Include": "an include", "FilterBlock": "a filter block"}.get(
        type(node).__name__, f"what Jinja calls {type(node).__name__}"
    )
