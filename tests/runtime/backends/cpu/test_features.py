"""What a CPU's flags say of its products."""

from pathlib import Path

import pytest

from qwen_aot.runtime.backends.cpu.features import has_exact_integer_products


@pytest.mark.parametrize(
    ("cpuinfo", "is_exact"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd asimddp\n", True),
        (None, True),
    ],
)
def test_integer_products_are_exact_with_vnni_or_off_x86(tmp_path: Path, cpuinfo: str | None, is_exact: bool) -> None:
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert has_exact_integer_products(tmp_path) is is_exact
