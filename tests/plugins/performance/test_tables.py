"""The document and the recorded resources against what the code and the compiler give."""

from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins import aot
from qwen_aot.plugins.performance import tables
from qwen_aot.plugins.performance.resources import measured, recorded, resources_of
from qwen_aot.plugins.variants import SMS, select

DOCUMENT = Path(__file__).parents[3] / "docs" / "plugins-performance.md"


def test_the_document_has_the_tables_that_the_code_makes():
    text = DOCUMENT.read_text()
    assert tables.filled_in(text) == text, (
        "run `python -m qwen_aot.plugins.performance --document docs/plugins-performance.md`"
    )


def test_the_document_names_every_device_and_links_back():
    text = DOCUMENT.read_text()
    assert all(tables.DEVICES[device].name in text for device in tables.GPUS)
    assert "(plugins-performance.md)" in (DOCUMENT.parent / "plugins.md").read_text()


def test_a_missing_mark_is_an_error():
    with pytest.raises(BuildError, match="lacks the marks <!-- table: devices -->"):
        tables.filled_in("# No table")


def test_a_device_whose_gpu_is_not_listed():
    with pytest.raises(BuildError, match="what GeForce RTX 5090 computes isn't listed"):
        tables.gpu_of("rtx-5090")


def test_resources_that_were_not_recorded():
    variant = select("9.0", "moe_sum", dtype="bf16")
    with pytest.raises(BuildError, match=r"no resources are recorded of moe_sum-bf16 for SM 9\.0"):
        resources_of("9.0", variant)


def test_a_folder_without_the_kernels(tmp_path):
    with pytest.raises(BuildError, match=r"sm_80 lacks moe_count: compile it with `python -m \S+\.aot --sm 8\.0"):
        measured(tmp_path)


def test_recorded_resources_are_those_of_the_kernels_of_the_library(plugin_build):
    """Of every variant that was recorded; a change of a kernel or a tile must be recorded again."""
    sm = "8.9"  # which the tests' library is built for, anew where a source changed
    assert measured(plugin_build / "build" / "kernels", (sm,)) == {sm: recorded()[sm]}


@pytest.mark.deep
@pytest.mark.slow
@pytest.mark.parametrize("sm", [sm for sm in SMS if sm != "8.9"])
@pytest.mark.parametrize("only", ["*-fp16-*", "moe_[cs]*"])
def test_recorded_resources_are_those_of_a_new_compilation(sm, only, tmp_path, monkeypatch):
    """The same of the others."""
    aot.build([sm], tmp_path, only=only)
    built = {path.stem for path in (tmp_path / f"sm_{sm.replace('.', '')}").glob("*.cubin")}
    listed = [variant for variant in aot.variants(sm) if variant.name in built and "bf16" not in variant.name]
    monkeypatch.setattr("qwen_aot.plugins.performance.resources.variants", lambda _: listed)
    assert listed
    assert measured(tmp_path, (sm,))[sm] == {variant.name: recorded()[sm][variant.name] for variant in listed}
