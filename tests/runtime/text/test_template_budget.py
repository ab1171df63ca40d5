"""A template's loops and calls are counted, and mean what they mean uncounted."""

import jinja2
import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.text import template_budget
from qwen_aot.runtime.text.chat_template import ChatTemplate

LOOPS = """
{%- for a in [1, 2, 3] %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{% endfor %}
{%- for key, value in {'a': 1, 'b': 0}.items() if value %}{{ key }}{{ loop.length }}{% else %}never{% endfor %}
{%- for x in nothing %}{{ x }}{% else %}none{% endfor %}
{%- for x in 'abc' | select %}{{ loop.first }}{{ loop.length }}{{ x }}{% endfor %}
{%- for x in [[1, [2]], [3]] recursive %}
{%- if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{{ loop.depth }}{% endif %}{% endfor %}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('m') }}
"""


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100) %}{% for b in range(100) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(20) }}",
        "{% for a in [range(5000)] recursive %}{% if a is iterable %}{{ loop(a) }}{% endif %}{% endfor %}",
        "{% for a in messages %}{% for b in range(600) if b > 600 %}{% endfor %}{% endfor %}",
    ],
    ids=["loops", "macros", "recursive loop", "a loop's condition"],
)
def test_a_template_that_would_run_for_years_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 1000)
    template = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(GenerationError, match="it takes more than 1000 rounds of loops and calls"):
            template.render([{"role": "user", "content": "a"}] * 2)


def test_each_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 10)
    template = ChatTemplate("{% for a in range(9) %}{{ a }}{% endfor %}", {})  # nine rounds and the call of range
    assert [template.render([]) for _ in range(3)] == ["012345678"] * 3


def test_loops_that_are_counted_mean_the_same() -> None:
    reference = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(LOOPS).render()
    assert "none" in reference and "(1" in reference
    assert ChatTemplate(LOOPS, {}).render([]) == reference
