"""The traced tower and resampler against the reference, in every form that is run; seeded faults must show."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.graph.save import save_graph
from qwen_aot.exporter.graph.vision_trace import trace_vision
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.widen import widen_bf16
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.sources import check_headers
from qwen_aot.exporter.weights.stitch import stitch
from tests.exporter.stepper import open_session
from tests.vision_reference import TINY, ArrayCheckpoint, Sizes, Tower, make_tower, seeing_config, tensors_of

LOWERINGS: Mapping[str, Callable[[Traced], Traced]] = {
    "traced": lambda traced: traced,
    "ort": ort.lower,
    "standard": standard.lower,
}
TOLERANCE = 1e-4  # of values up to 7: fp32 sums in another order; 1.3e-5 was seen


def checkpoint_of(tower: Tower, config: ModelConfig) -> ArrayCheckpoint:
    decoder = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    return ArrayCheckpoint(config, decoder | tensors_of(tower))


def run(
    tower: Tower,
    sizes: Sizes,
    folder: Path,
    pixels: np.ndarray,
    lower: Callable[[Traced], Traced] = ort.lower,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> np.ndarray:
    config = seeing_config(sizes)
    folder.mkdir(exist_ok=True)
    traced = lower(trace_vision(config, dtype))
    stitch(traced, checkpoint_of(tower, config), folder / "model.onnx.data")
    (rows,) = open_session(save_graph(traced, folder)).run(None, {"pixels": pixels})
    return np.asarray(rows)


def reference(tower: Tower, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        rows: np.ndarray = tower(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    return rows


def images(sizes: Sizes, count: int = 2) -> np.ndarray:
    shape = (count, sizes.image_size, sizes.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        TINY,  # tables become smaller
        dataclasses.replace(TINY, image_size=448, width=32, heads=2, layers=1),  # and larger, as the published ones do
        dataclasses.replace(TINY, image_size=224, patch_size=14, layers=2),  # and stay as they are
    ],
    ids=["112", "448", "224"],
)
def test_rows_are_the_references(sizes: Sizes, lowering: str, tmp_path: Path) -> None:
    tower, pixels = make_tower(sizes), images(sizes)
    rows = run(tower, sizes, tmp_path, pixels, LOWERINGS[lowering])
    expected = reference(tower, pixels)
    assert rows.shape == (2, 256, sizes.output_dim) and np.abs(expected).max() > 3
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def test_an_image_alone_is_what_it_is_beside_others(tmp_path: Path) -> None:
    tower, pixels = make_tower(), images(TINY, 3)
    together = run(tower, TINY, tmp_path, pixels)
    for index in range(3):
        alone = run(tower, TINY, tmp_path / str(index), pixels[index : index + 1])
        np.testing.assert_allclose(alone[0], together[index], atol=TOLERANCE)


def _rolled(tower: Tower, name: str) -> None:
    """The same values as three blocks of queries, keys and values, which is not how they are stored."""
    for block in tower.transformer["resblocks"]:
        weight = block.attn.in_proj.weight
        heads, width = TINY.heads, TINY.width
        with torch.no_grad():
            weight.copy_(weight.reshape(heads, 3, width // heads, width).permute(1, 0, 2, 3).reshape(3 * width, width))


def _swapped(tower: Tower, name: str) -> None:
    with torch.no_grad():
        tower.conv1.weight.copy_(tower.conv1.weight.flip(1))


def _scaled(tower: Tower, name: str) -> None:
    with torch.no_grad():
        tower.get_parameter(name).mul_(1.05)


def _turned(tower: Tower, name: str) -> None:
    with torch.no_grad():
        tower.get_parameter(name).copy_(tower.get_parameter(name).roll(1, 0))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (_rolled, "in_proj stored in three blocks"),
        (_swapped, "blue, green, red"),
        *[
            (fault, name)
            for name in ("positional_embedding", "attn_pool.pos_embed", "proj", "ln_pre.weight")
            for fault in (_scaled, _turned)
        ],
        (_turned, "attn_pool.query"),  # which a norm follows, whatever its scale
        (_scaled, "transformer.resblocks.2.mlp.c_fc.bias"),
        (_turned, "attn_pool.attn.in_proj_bias"),
        (_scaled, "ln_post.bias"),
        (_turned, "transformer.resblocks.1.ln_2.bias"),
    ],
)
def test_faults_show(fault: Callable[[Tower, str], None], name: str, tmp_path: Path) -> None:
    """What a wrong reading of one tensor does is far above the tolerance."""
    pixels = images(TINY, 1)
    expected = reference(make_tower(), pixels)
    wrong = make_tower()
    fault(wrong, name)
    rows = run(wrong, TINY, tmp_path, pixels)
    assert np.abs(rows - expected).max() > 20 * TOLERANCE


def test_positions_on_values_would_show() -> None:
    tower, pixels = make_tower(), images(TINY, 1)
    expected = reference(tower, pixels)
    pool = tower.attn_pool
    plain = pool.attn.forward
    pool.attn.forward = lambda query, key, value: plain(query, key, key)  # type: ignore[method-assign]
    assert np.abs(reference(tower, pixels) - expected).max() > 0.1


def loud_tower() -> Tower:
    """Layers that write 9e4 into the stream, as large vision transformers do: fp16 ends at 65504."""
    tower = make_tower()
    with torch.no_grad():
        tower.transformer["resblocks"][0].mlp["c_proj"].bias[:3] += torch.tensor([3e4, -3e4, 3e4])
        tower.transformer["resblocks"][1].mlp["c_proj"].bias[:3] += torch.tensor([6e4, -6e4, 6e4])
    return tower


def run_strictly(tower: Tower, folder: Path, pixels: np.ndarray, lower: Callable[[Traced], Traced]) -> np.ndarray:
    """The fp16 graph by onnx's reference evaluator, where every value has the range of the type that the graph names.

    ONNX Runtime's CPU provider computes fp16 graphs in fp32 and drops casts there and back, so that nothing overflows.
    """
    traced = lower(trace_vision(seeing_config(TINY), ir.DataType.FLOAT16))
    stitch(traced, checkpoint_of(tower, seeing_config(TINY)), folder / "model.onnx.data")
    with np.errstate(over="ignore", invalid="ignore"):
        (rows,) = ReferenceEvaluator(onnx.load(save_graph(traced, folder))).run(None, {"pixels": pixels})
    return np.asarray(rows)


def _narrow_stream_before(initializer: str) -> Callable[[Traced], Traced]:
    """The standard lowering, after which what a product with this weight reads has been fp16 in between."""

    def lower(traced: Traced) -> Traced:
        lowered = standard.lower(traced)
        graph = lowered.model.graph
        transpose = graph.initializers[initializer].consumers()[0]
        product = transpose.outputs[0].consumers()[0]
        narrow = ir.node("Cast", [product.inputs[0]], {"to": ir.DataType.FLOAT16})
        wide = ir.node("Cast", narrow.outputs, {"to": ir.DataType.FLOAT})
        graph.insert_before(product, [narrow, wide])
        product.replace_input_with(0, wide.outputs[0])
        return lowered

    return lower


def test_a_stream_beyond_fp16_costs_an_fp16_graph_nothing(tmp_path: Path) -> None:
    tower, pixels = loud_tower(), images(TINY, 1)
    rows = run_strictly(tower, tmp_path, pixels, standard.lower)
    assert cosine(rows, reference(tower, pixels)) > 0.9999


@pytest.mark.parametrize("loud", [True, False], ids=["loud", "quiet"])
def test_an_fp16_stream_before_the_resampler_would_show(loud: bool, tmp_path: Path) -> None:
    """The evaluator does overflow, and at the one place where nothing normalises the stream before a projection."""
    tower, pixels = loud_tower() if loud else make_tower(), images(TINY, 1)
    rows = run_strictly(tower, tmp_path, pixels, _narrow_stream_before("vision.resampler.kv_proj.weight"))
    assert np.isfinite(rows).all() != loud


def test_a_bf16_graph_of_it_has_the_references_rows(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no bfloat16 MatMul, so that only weights are rounded here."""

    def lower(traced: Traced) -> Traced:
        lowered = standard.lower(traced)
        widen_bf16(lowered)
        return lowered

    tower, pixels = loud_tower(), images(TINY, 1)
    assert cosine(run(tower, TINY, tmp_path, pixels, lower, ir.DataType.BFLOAT16), reference(tower, pixels)) > 0.999


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_the_published_tower_is_traced_in_no_time_and_memory() -> None:
    config = seeing_config(Sizes())
    traced = standard.lower(trace_vision(config, ir.DataType.FLOAT16))
    graph = traced.model.graph
    assert sum(node.op_type == "Attention" for node in graph) == 49
    assert set(graph.initializers) == {output.name for recipe in traced.recipes.values() for output in recipe.outputs}
    check_headers(RandomCheckpoint(config))


def test_what_cant_be_traced() -> None:
    with pytest.raises(ExportError, match="a model of type qwen2 has no vision tower to trace"):
        trace_vision(dataclasses.replace(seeing_config(), vision=None))
    with pytest.raises(ExportError, match="compute type INT8 can't be traced; accepted: FLOAT, FLOAT16, BFLOAT16"):
        trace_vision(seeing_config(TINY), ir.DataType.INT8)


@pytest.mark.parametrize("missing", ["transformer.visual.proj", "transformer.visual.transformer.resblocks.2.ln_1.bias"])
def test_a_checkpoint_without_one_of_its_tensors(missing: str, tmp_path: Path) -> None:
    config = seeing_config(TINY)
    checkpoint = checkpoint_of(make_tower(), config)
    del checkpoint.tensors[missing]
    with pytest.raises(Exception, match=f"tensor {missing} is missing"):
        check_headers(checkpoint)
    checkpoint = checkpoint_of(make_tower(), config)
    checkpoint.tensors["transformer.visual.more"] = checkpoint.tensors[missing]
    with pytest.raises(Exception, match=r"the model has no place for 1 tensors: transformer.visual.more"):
        check_headers(checkpoint)
