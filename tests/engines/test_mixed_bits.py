"""Mixed bits within a budget, from a checkpoint to the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.quantize import quantize_checkpoint
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny

TEXTS = ("The quick brown fox jumps over the lazy dog. What is the capital of France? " * 40,)


def spec_of(bits_per_weight: float) -> QuantizeSpec:
    return QuantizeSpec(bits_per_weight=bits_per_weight, tokens=256, sequence_length=32)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    save_tiny(path, with_tokenizer=True, moe=experts if request.param == "moe" else None)
    return path


@pytest.mark.parametrize("budget", [4.6, 6.0])
def test_the_average_is_kept_and_nearly_used(model: Path, tmp_path: Path, budget: float) -> None:
    with open_checkpoint(model) as checkpoint:
        report = quantize_checkpoint(checkpoint, spec_of(budget), tmp_path / "out", texts=TEXTS, threads=1)
    assert budget - 1.2 < report.bits_per_weight <= budget
    bits = [form.bits for form in report.forms.values()]
    assert (bits.count(8) > len(bits) // 4) == (budget == 6.0)
    with open_checkpoint(tmp_path / "out") as written:
        found = {name: info.encoding.form for name, info in written.tensors.items() if info.encoding is not None}
    assert found == dict(report.forms)
    for name, form in report.forms.items():
        if "k_proj" in name:
            assert report.forms[name.replace("k_proj", "q_proj")] == form  # they are one product
        if "experts.1." in name:
            assert report.forms[name.replace("experts.1.", "experts.0.")] == form  # one kernel has them all


def test_a_budget_below_the_smallest_codes_is_refused(model: Path, tmp_path: Path) -> None:
    with (
        open_checkpoint(model) as checkpoint,
        pytest.raises(
            BuildError, match=r"bits_per_weight is 4\.05, and the smallest codes of this model take 4\.[2-9]"
        ),
    ):
        quantize_checkpoint(checkpoint, spec_of(4.05), tmp_path / "out", texts=TEXTS, threads=1)
    assert not (tmp_path / "out").exists()
