"""What a CPU's flags say of its products."""

from pathlib import Path

import pytest

from qwen_aot.runtime.backends.cpu.features import NO_VNNI, has_exact_integer_products

CPUINFO = {
    "avx512_vnni": "flags\t\t: fpu avx2 avx512_vnni\n",
    "avx_vnni": "flags\t\t: fpu avx2 avx_vnni\n",
    "neither": "flags\t\t: fpu avx2 avx512f\n",
    "arm": "Features\t: fp asimd asimddp\n",
    "untold": None,
}


@pytest.mark.parametrize("cpu", CPUINFO)
@pytest.mark.parametrize("is_hidden", [False, True])
def test_integer_products_are_exact_with_vnni_that_is_not_hidden_and_off_x86(
    tmp_path: Path, cpu: str, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NO_VNNI, "1" if is_hidden else "")
    if (text := CPUINFO[cpu]) is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(text)
    exact = {"arm", "untold"} if is_hidden else {"avx512_vnni", "avx_vnni", "arm", "untold"}
    assert has_exact_integer_products(tmp_path) is (cpu in exact)
