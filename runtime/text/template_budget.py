"""How much of a chat template's loops and calls one rendering runs: loops within loops would run for years.

Jinja's sandbox bounds one `range`, and neither what stands in it nor macros that call themselves twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_STEPS", "BudgetedEnvironment", "budget"]

MAX_STEPS = 1_000_000  # rounds and calls: seconds. A conversation of 10,000 messages takes some 100,000

_left: ContextVar[list[int]] = ContextVar("left")  # of the rendering at work: what its loops count down, and from where


@contextmanager
def budget(steps: int | None = None) -> Iterator[None]:
    """Within it, a template of a `BudgetedEnvironment` runs so many rounds of loops and calls, and then fails.

    Args:
        steps: how many; None: MAX_STEPS.

    Raises:
        jinja2.exceptions.SecurityError: in the template, which took more.
    """
    most = MAX_STEPS if steps is None else steps
    token = _left.set([most, most])
    try:
        yield
    finally:
        _left.reset(token)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with loops and calls that are counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_Counted.__name__] = pass_context(_counted)

    def counting(self, tree: nodes.Template) -> jinja2.Template:
        """Compiles a parsed template, changing its tree: each loop walks over what counts."""
        for loop in tree.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, _Counted.__name__, [], [], None, None, lineno=loop.lineno)
            loop.iter = counted.set_environment(self)
        return self.from_string(tree)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as Jinja's
        """Calls what a template calls; a recursive loop's next level is counted as the first is."""
        _count()
        if isinstance(__obj, LoopContext) and args:
            args = (_Counted(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)


class _Counted:
    """Something to walk over, a step a round."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _count()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError, as of the items themselves


def _counted(context: Context, items: Iterable[Any]) -> _Counted:
    return _Counted(items)


def _count() -> None:
    left = _left.get()
    left[0] -= 1
    if left[0] < 0:
        raise SecurityError(f"it takes more than {left[1]} rounds of loops and calls")
