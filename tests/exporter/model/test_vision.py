"""The facts of a vision tower, and the table of its tensors, by the reference's own parameters."""

import dataclasses
import math
from typing import Any

import onnx_ir as ir
import pytest
import torch

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.io_spec import io_spec, vision_io_spec
from qwen_aot.exporter.model.variants import variant_config
from qwen_aot.exporter.model.vision import VisionConfig
from qwen_aot.exporter.model.vision_tensors import (
    PREFIX,
    num_model_parameters,
    num_vision_parameters,
    vision_parameters,
    vision_tensors,
)
from tests.test_vision_reference import PUBLISHED_PARAMETERS
from tests.vision_reference import TINY, Sizes, Tower, seeing_config

PUBLISHED = VisionConfig(**dataclasses.asdict(Sizes()))
SMALL = VisionConfig(**dataclasses.asdict(TINY))


@pytest.mark.parametrize("sizes", [TINY, Sizes()], ids=["tiny", "published"])
def test_the_table_is_exactly_the_references_parameters(sizes: Sizes) -> None:
    config = VisionConfig(**dataclasses.asdict(sizes))
    with torch.device("meta"):
        expected = {PREFIX + name: tuple(value.shape) for name, value in Tower(sizes).named_parameters()}
    listed = [(tensor.name, tensor.shape) for tensor in vision_tensors(config)]
    assert dict(listed) == expected and len(listed) == len(expected)
    assert num_vision_parameters(config) == sum(map(math.prod, expected.values()))
    assert {parameter.tensor.name for parameter in vision_parameters(config)} == expected.keys()


def test_published_counts() -> None:
    assert num_vision_parameters(PUBLISHED) == PUBLISHED_PARAMETERS
    assert (PUBLISHED.mlp_width, PUBLISHED.patches, PUBLISHED.grid, PUBLISHED.resampler_heads) == (8192, 1024, 32, 32)


def test_a_model_with_a_tower_counts_both() -> None:
    seeing = seeing_config()
    blind = dataclasses.replace(seeing, vision=None)
    assert seeing.vision is not None
    assert num_model_parameters(seeing) == num_model_parameters(blind) + num_vision_parameters(seeing.vision)


def test_inputs_and_outputs() -> None:
    seeing = seeing_config()
    names = [tensor.name for tensor in io_spec(seeing, ir.DataType.FLOAT, speculates=True).step]
    assert names[-3:] == ["logits_positions", "image_embeddings", "image_positions"]
    blind = io_spec(dataclasses.replace(seeing, vision=None), ir.DataType.FLOAT)
    assert not any("image" in tensor.name for tensor in blind.inputs)
    (pixels,), (rows,) = vision_io_spec(PUBLISHED).inputs, vision_io_spec(PUBLISHED).outputs
    assert pixels.dims == ("B", 448, 448, 3) and rows.dims == ("B", 256, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, r"visual.layers is 0; accepted: whole numbers from 1 to 1000"),
        ({"layers": True}, r"visual.layers is True; accepted: whole numbers"),
        ({"width": 1.5}, r"visual.width is 1.5; accepted: whole numbers"),
        ({"image_size": 449}, r"visual.image_size is 449; accepted: multiples of 14"),
        ({"heads": 15}, r"visual.width is 1664; accepted: multiples of 15"),
        ({"output_dim": 4000}, r"visual.output_dim is 4000; accepted: multiples of 128"),
        ({"mlp_ratio": math.nan}, r"visual.mlp_ratio is nan; accepted"),
        ({"mlp_ratio": math.inf}, r"visual.mlp_ratio is inf; accepted"),
        ({"mlp_ratio": "4"}, r"visual.mlp_ratio is '4'; accepted"),
        ({"mlp_ratio": 1e-9}, r"visual.mlp_ratio is 1e-09; accepted"),
        ({"mlp_ratio": 1e6}, r"visual.width x mlp_ratio is 1,664,000,000; accepted: up to 1,048,576"),
        ({"image_size": 14 * 129}, r"visual.image_size / patch_size, squared is 16,641; accepted: up to 16,384"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(PUBLISHED, **changes)


def test_a_tower_of_another_width_than_the_decoder() -> None:
    with pytest.raises(CheckpointError, match=r"visual.output_dim is 4096; accepted: hidden_size \(256\)"):
        dataclasses.replace(seeing_config(), vision=PUBLISHED)


def test_the_published_model_has_the_published_parameters() -> None:
    """9.6 B in the paper's table."""
    config = variant_config("qwen-vl")
    assert num_model_parameters(config) == 7_721_324_544 + PUBLISHED_PARAMETERS == 9_656_935_168


@pytest.mark.parametrize("name", ["qwen-vl-plus", "Qwen/Qwen-VL-Max", "qwen-vl-max-latest"])
def test_models_without_open_weights(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} has no open weights: .*; accepted of its kind: qwen-vl"):
        variant_config(name)
