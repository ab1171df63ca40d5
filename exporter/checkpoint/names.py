"""Names of tensors in files of one architecture and format, both ways: a role's name, and a name's role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.exporter.model.tensors import Role

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_FIELD = re.compile(r"\{(layer|expert)\}")


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
        self._roles = {_FIELD.sub("#", template): role for role, template in templates.items()}
        self._templates = dict(templates)

    def find(self, stored: str) -> Place | None:
        """What a tensor of a file is, or None: it is none of these."""
        role = self._roles.get(_INDEX.sub("#", stored))
        if role is None:
            return None
        template = self._templates[role]
        indices = dict(zip(_FIELD.findall(template), map(int, _INDEX.findall(stored)), strict=True))
        place = Place(role, **indices)
        # An index is written in one way: `01` is another name.
        return place if template.format(layer=place.layer, expert=place.expert) == stored else None


CANONICAL = TensorNames({role: role.template for role in Role})  # transformers' own, by which readers give tensors
