"""The compiler of what is given to others: for another processor, and for every Linux with glibc 2.31 or later.

It is that of `ziglang` (PyPI), which brings the headers and stubs of each glibc and a C++ library that is linked in.
"""

from __future__ import annotations

import importlib.util
import sys

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command

__all__ = ["OLDEST_GLIBC", "PROCESSORS", "portable_compiler", "require_portable_compiler"]

OLDEST_GLIBC = "2.31"  # of JetPack 5 and Ubuntu 20.04
PROCESSORS = ("x86_64", "aarch64")


def require_portable_compiler(option: str) -> None:
    """Looks for ziglang.

    Args:
        option: what asks for it, in the words of a user.

    Raises:
        BuildError: it isn't installed; says how it is.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(
            f"{option} compiles with the package ziglang, which isn't installed: `{install_command('release')}`"
        )


def portable_compiler(language: str, processor: str) -> list[str]:
    """The compiler's command for a processor and OLDEST_GLIBC.

    Args:
        language: "cc" or "c++".
        processor: of PROCESSORS.
    """
    return [sys.executable, "-m", "ziglang", language, "-target", f"{processor}-linux-gnu.{OLDEST_GLIBC}"]
