"""Names of tensors in files of one architecture and format, both ways: a role's name, and a name's role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.exporter.model.tensors import Role

_SEGMENT = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a number between dots
_FIELD = re.compile(r"\{(layer|expert)\}")
_INDEX = "0|[1-9][0-9]{0,8}"  # one way of writing each: `01` is another name


@dataclass(frozen=True, slots=True)
class Place:
    """Which tensor of a model: its role, and the layer and expert that it is of, if any."""

    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """By which readers give it (see `Role`)."""
        return self.role.tensor_name(self.layer, self.expert)


class TensorNames:
    """A template for each role, `{layer}` and `{expert}` in the places of indices: `blk.{layer}.attn_q.weight`.

    A file may hold all experts of a layer in one tensor, whose template then has no `{expert}`, and needs no template
    for roles that its models don't have.
    """

    def __init__(self, templates: Mapping[Role, str]) -> None:
        # By what is left of a name without its numbers, so that a name is compared with one pattern.
        self._patterns = {
            _without_numbers(template): (role, _pattern(template)) for role, template in templates.items()
        }
        assert len(self._patterns) == len(templates), "two roles have one name"

    def find(self, stored: str) -> Place | None:
        """What a tensor of a file is, or None: it is none of these."""
        role, pattern = self._patterns.get(_without_numbers(stored), (None, None))
        match = None if pattern is None else pattern.fullmatch(stored)
        if role is None or match is None:
            return None
        return Place(role, **{field: int(index) for field, index in match.groupdict().items()})


def _without_numbers(name: str) -> str:
    return _SEGMENT.sub("#", _FIELD.sub("0", name))


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(layer|expert)\\\}", rf"(?P<\1>{_INDEX})", re.escape(template)))


CANONICAL = TensorNames({role: role.template for role in Role})  # transformers' own, by which readers give tensors
