"""Boxes that answers of Qwen-VL name: read from a text, and drawn onto a picture.

`<ref>the cat</ref><box>(112,37),(640,988)</box>` names what stands between two corners, in thousandths of the picture's
width and height.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_aot.runtime.vision.pictures import Picture

__all__ = ["SCALE", "Box", "draw_boxes", "find_boxes"]

SCALE = 1000  # corners are in so many parts of a side

_NUMBER = r"\s*(\d{1,4})\s*"
_CORNER = rf"\({_NUMBER},{_NUMBER}\)"
_PIECE = re.compile(rf"<ref>(?P<label>(?:(?!</?ref>).)*)</ref>|<box>\s*{_CORNER}\s*,\s*{_CORNER}\s*</box>", re.DOTALL)
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


@dataclass(frozen=True, slots=True)
class Box:
    """One box of an answer.

    Attributes:
        label: what the answer says it is; empty where it doesn't.
        left, top, right, bottom: of 0 to SCALE; left <= right and top <= bottom.
    """

    label: str
    left: int
    top: int
    right: int
    bottom: int

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in a picture of width and height `size`; the last two are inside of it."""
        width, height = size
        across, down = max(width - 1, 0) / SCALE, max(height - 1, 0) / SCALE
        return round(self.left * across), round(self.top * down), round(self.right * across), round(self.bottom * down)


def find_boxes(text: str) -> list[Box]:
    """The boxes of an answer, in order; each has the label that stands before it, several boxes may have one.

    Corners beyond the picture are moved to its edge, and swapped ones put in order. What isn't of this form is text.
    """
    boxes, label = [], ""
    end = 0
    for match in _PIECE.finditer(text):
        if match["label"] is not None:
            label = match["label"].strip()
        else:
            x1, y1, x2, y2 = (min(int(number), SCALE) for number in match.groups()[1:])
            has_label = text[end : match.start()].strip(" ,;") == ""  # a label is of the boxes right behind it
            label = label if has_label else ""
            boxes.append(Box(label, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
        end = match.end()
    return boxes


def draw_boxes(picture: Picture, boxes: Sequence[Box]) -> Picture:
    """A copy of a picture with the boxes on it, each label in a color of its own."""
    from PIL import ImageDraw, ImageFont

    image = picture.image.copy()
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 250))
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 40)))
    colors: dict[str, str] = {}
    for box in boxes:
        color = colors.setdefault(box.label, _COLORS[len(colors) % len(_COLORS)])
        left, top, right, bottom = box.pixels(image.size)
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
        if box.label:
            place = (left + line, max(0, top - line))
            draw.rectangle(draw.textbbox(place, box.label, font=font), fill=color)
            draw.text(place, box.label, font=font, fill="white")
    return Picture(image, picture.name)
