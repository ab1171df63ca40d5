"""How plots look, and how one becomes a file."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure

from qwen_aot.figures import render, scale, style, tidy


def figure(values: list[float]) -> Figure:
    made = Figure(figsize=(8, 4))
    axes = made.subplots()
    axes.plot(values)
    tidy(axes)
    return made


def test_a_png() -> None:
    content = render(figure([1, 2]), ".png")
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 600)


def test_an_svg_is_the_same_each_time() -> None:
    first, second = (render(figure([1, 2]), ".svg") for _ in range(2))
    assert ET.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    assert first == second
    assert first != render(figure([1, 3]), ".svg")


def test_styles_begin_again_after_seven() -> None:
    styles = [style(index) for index in range(14)]
    assert len({colour for colour, _ in styles}) == len({mark for _, mark in styles}) == 7
    assert styles[:7] == styles[7:]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.0, 10.0], "linear"),
        ([1.0, 30.0], "log"),
        ([0.0, 30.0], "linear"),
        ([-1.0, 30.0], "linear"),
        ([0.0], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_values_are_far_apart(values: list[float], kind: str) -> None:
    axes = Figure().subplots()
    scale(axes, values)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == kind and low <= min(values) and high > max(values)
    assert kind == "log" or low <= 0
