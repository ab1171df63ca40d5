"""Doubles of CUDA's driver, of ONNX Runtime with its CUDA provider, and of TensorRT, for the C library."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from tests.runtime.capi.engines import Dialog
from tests.runtime.capi.native import PROGRAMS, run

(ONNXRUNTIME,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
NOTHING = "contexts 0 current 0 device 0 pinned 0 streams 0 graphs 0 executables 0"


def build_double(folder: Path, name: str, *, flags: Sequence[str] = ()) -> Path:
    """The library of src/NAME.cpp, kept in a folder that several processes may share."""
    library, source = folder / f"lib{name}.so", PROGRAMS / f"{name}.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (source, PROGRAMS / "cuda_double.h"))
        if not library.exists() or library.stat().st_mtime < newest:
            part = library.with_suffix(".part")
            strict = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
            run(["g++", *strict, *flags, str(source), "-ldl", "-o", str(part)])
            part.replace(library)
    return library


class GpuDialog(Dialog):
    """The program `engine` with doubles; when it ends, nothing of the GPU may be left."""

    def __init__(self, program: Path, driver: Path, environment: Mapping[str, str] | None = None) -> None:
        self.driver = driver
        doubles = {"CUDA_DOUBLE": str(driver), "REAL_ONNXRUNTIME": str(ONNXRUNTIME)}
        super().__init__(program, {**os.environ, **doubles, **(environment or {})})

    def fail(self, function: str, nth: int = 1, result: int = 999) -> None:
        """The nth call of a function of the driver from now on fails."""
        self.want("fail_in_driver", driver=str(self.driver), function=function, nth=nth, result=result)

    def held(self) -> str:
        """What there is on the GPU and wasn't given back."""
        return str(self.want("describe_driver", driver=str(self.driver))["text"])

    def open(self, bundle: Path, **options: Any) -> Any:
        """What comes of opening a bundle."""
        request = {"engines": 1, "threads": 0, "cuda_driver": str(self.driver), **options}
        return self.ask("open", bundle=str(bundle), **request)


def tensorrt_stubs(headers: Path) -> str:
    """C++ that derives a class from each of TensorRT's interfaces, whose functions all end the program."""
    lines = [
        "#pragma once",
        "#include <NvInferRuntime.h>",
        "#include <cstdio>",
        "#include <cstdlib>",
        '#pragma GCC diagnostic ignored "-Wunused-parameter"',
        '#pragma GCC diagnostic ignored "-Wdeprecated-declarations"',
        "[[noreturn]] inline void unexpected(char const* what)",
        "{",
        '    std::fprintf(stderr, "double of TensorRT: %s\\n", what);',
        "    std::abort();",
        "}",
    ]
    for file, name in (
        ("NvInferImpl.h", "apiv::VRuntime"),
        ("NvInferImpl.h", "apiv::VCudaEngine"),
        ("NvInferImpl.h", "apiv::VExecutionContext"),
        ("NvInferRuntimeCommon.h", "IPluginRegistry"),
    ):
        short = name.rpartition(":")[2]
        lines.append(f"class {short}Stub : public nvinfer1::{name} {{")
        lines.append("    using AsciiChar = nvinfer1::AsciiChar; public:")
        for declaration in _pure_functions((headers / file).read_text(), short):
            function = declaration.split("(")[0].split()[-1].lstrip("*&")
            lines.append(f'    {declaration} override {{ unexpected("{short}::{function} was called"); }}')
        lines.append("};")
    # The interfaces' names are used within their namespace.
    body = "\n".join(lines)
    start = body.index("class VRuntimeStub")
    return f"{body[:start]}namespace nvinfer1 {{\n{body[start:]}\n}}\nusing nvinfer1::IPluginRegistryStub;\n"


def _pure_functions(header: str, name: str) -> list[str]:
    """Declarations of a class's pure virtual functions, without `virtual` and `= 0`."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)
    text = re.sub(r"#if ENABLE_.*?#endif", "", text, flags=re.DOTALL)
    start = re.search(rf"class {name}\b[^;{{]*{{", text)
    assert start is not None
    depth, end = 1, start.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    body = text[start.end() : end]
    found = re.findall(r"virtual\s+([^;{}]*?)=\s*0\s*;", body)
    return [" ".join(re.sub(r'\s*=\s*""', "", declaration).split()) for declaration in found]
