"""Nothing of a C++ library is asked for by the library's inside: it runs where another one, or none, is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.capi.native import SOURCES, Native, run

# What libc has of C++'s runtime: functions that are called when a library is unloaded.
OF_LIBC = {"__cxa_atexit", "__cxa_finalize"}


def foreign(*objects: Path) -> set[str]:
    """Symbols that objects need of a C++ library; archives are objects too."""
    needed, defined = set(), set()
    for line in run(["nm", "--format=posix", *objects]).splitlines():
        fields = line.split()
        if len(fields) >= 2 and len(fields[1]) == 1:
            (needed if fields[1] in "Uw" else defined).add(fields[0])
    mangled = ("_Z", "__cxa_", "__gxx_", "__dynamic_cast", "_Unwind_", "__once_proxy", "__emutls")
    return {name for name in needed - defined - OF_LIBC if name.startswith(mangled)}


def test_no_symbol_of_a_cpp_library(native: Native) -> None:
    assert foreign(native.library) == set()


@pytest.mark.parametrize(
    ("code", "symbol"),
    [
        ("char f(std::string_view t) { return t.substr(t.size() / 3)[0]; }", "_ZSt24__throw_out_of_range_fmtPKcz"),
        ("int* f() { return new int(5); }", "_Znwm"),
        ("struct V { virtual ~V(); }; V::~V() {}", "_ZdlPvm"),
        ("std::string f() { return std::string(99, 'x'); }", "_ZNSt7__cxx1112basic_string"),
        ("int f(int n) { static int const first = n; return first; }", "__cxa_guard_acquire"),
        ("void f() { throw 1; }", "__cxa_throw"),
    ],
)
def test_what_would_be_seen(code: str, symbol: str, tmp_path: Path) -> None:
    """Negative control: what asks for one, with an option that the library is built with left out where need be."""
    source = tmp_path / "code.cpp"
    source.write_text(f"#include <string>\n#include <string_view>\n{code}\n")
    run(["g++", "-std=c++17", "-O2", "-c", source, "-o", tmp_path / "code.o"])
    assert any(name.startswith(symbol) for name in foreign(tmp_path / "code.o"))


def test_the_compiler_is_told_so() -> None:
    options = (SOURCES / "CMakeLists.txt").read_text(encoding="utf-8")
    for option in ("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"):
        assert option in options
