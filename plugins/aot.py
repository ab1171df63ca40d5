"""Compiles the kernels ahead of time, with no GPU: `python -m qwen_aot.plugins.aot --sm 8.9 -o FOLDER`.

FOLDER then holds, for each SM, a folder `sm_89` with one cubin a variant, beside it the PTX that it was assembled from
and a JSON record, and `manifest.json`, which lists them all; and with SM 8.0 a folder `ptx` with the PTX of its
variants, which later GPUs can compile. A record also is the cache: a variant whose sources, constants and compiler are
those of its record isn't compiled again.

An entry of a manifest: `name`; `kernel`; `match`, `constants`, `arguments`, `grid` (see plugins/variants.py);
`symbol`, the entry point, which takes `arguments` in that order and two null pointers; `num_warps` (32 threads each),
`shared_bytes` (dynamic shared memory of a launch); `file`, `bytes`, `sha256`; `ptx_sha256`, of the PTX beside it;
`source_hash`; `resources`.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import fnmatch
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_aot.errors import BuildError
from qwen_aot.extras import how_to_install
from qwen_aot.machine import usable_cores
from qwen_aot.plugins.signatures import KERNELS
from qwen_aot.plugins.variants import FAMILIES, SHARED_BYTES, SMS, Variant, variants

FORMAT_VERSION = 2
PTX_SM = "8.0"  # every later GPU can compile its PTX
_OPTIONS = {"enable_fp_fusion": True}  # of the compiler, for all variants
# Variables by which a compiler is told to make other code, which no hash would know of.
_COMPILER_VARIABLES = re.compile(r"TRITON_.*|PTXAS_.*|DISABLE_PTXAS_OPT|LLVM_.*|MLIR_.*")
_PART_PREFIX = ".qwen-aot-"  # of a file that is being written
_TENSOR_CORE_KERNELS = ("gqa_prefill", "moe_gate_up", "moe_down", "linear_prefill")
_NO_SPILL_KERNELS = (
    *("gqa_decode", "gqa_reduce", "moe_decode_gate_up", "moe_decode_down", "moe_sum"),
    *("linear_decode", "linear_reduce"),
)
# Spills that were looked at and accepted: (SM or "*", pattern of variant names) to the reason.
ACCEPTED_SPILLS: dict[tuple[str, str], str] = {}

# Tensor-core instructions of SASS: Ampere, Ada and small Blackwell; Hopper; large Blackwell (tcgen05).
TENSOR_CORE = re.compile(r"\b(?:[HIQO]MMA|[HIQO]GMMA|UTC[HIQO]MMA)\b")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a variant takes.

    Attributes:
        registers: Of each thread.
        spill_bytes: Stack of each thread; these kernels have no other use for one than spilled registers.
        tensor_core_instructions: In the machine code, counted once each.
    """

    registers: int
    spill_bytes: int
    tensor_core_instructions: int


def _origin(module: str) -> Path:
    specification = importlib.util.find_spec(module)
    if specification is None or specification.origin is None:
        raise BuildError(f"the source of {module} isn't installed")
    return Path(specification.origin)


def _sources(module: str) -> list[Path]:
    """The file of a kernel's module, and those of the kernels' modules that it imports."""
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = _origin(name)
            nodes = ast.walk(ast.parse(found[name].read_bytes()))
            imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            pending += [other for other in imported if other.startswith("qwen_aot.plugins.kernels.")]
    return [found[name] for name in sorted(found)]


def source_hash(sm: str, variant: Variant) -> str:
    """Hash of all that a manifest's entry depends on: sources, constants, types, grid, target, compiler."""
    kernel = KERNELS[variant.kernel]
    facts = {"format": FORMAT_VERSION, "sm": sm, "triton": importlib.metadata.version("triton"), **asdict(variant)}
    facts |= {"arguments": [asdict(argument) for argument in variant.arguments], "grid": kernel.grid}
    digest = hashlib.sha256(json.dumps({**facts, "options": _OPTIONS}, sort_keys=True).encode())
    for path in _sources(kernel.module):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _arch(sm: str) -> int:
    return int(sm.replace(".", ""))


def _write(path: Path, data: bytes) -> None:
    """Writes aside and renames, so that a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PART_PREFIX, suffix=".part", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:  # a full disk, for one
            os.unlink(file.name)
            raise


def cuda_tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that come with triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def measure(cubin: Path) -> Resources:
    """Reads a cubin's resource usage and machine code with `cuobjdump`."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuda_tool("cuobjdump", "--dump-resource-usage", str(cubin)))
    if usage is None:
        raise BuildError(f"cuobjdump reports no resource usage for {cubin}")
    registers, stack = map(int, usage.groups())
    return Resources(registers, stack, len(TENSOR_CORE.findall(cuda_tool("cuobjdump", "--dump-sass", str(cubin)))))


def compile_variant(sm: str, variant: Variant, folder: Path) -> dict[str, Any]:
    """Compiles one variant into `folder`/sm_NN (and `folder`/ptx for SM 8.0), and returns its manifest entry.

    Raises:
        BuildError: If the kernel's signature isn't that of `KERNELS`, or it needs scratch memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(KERNELS[variant.kernel].module), variant.kernel)
    names = [argument.name for argument in variant.arguments]
    taken, constants = kernel.arg_names[: len(names)], kernel.arg_names[len(names) :]
    if taken != names or set(constants) != set(variant.constants):
        listed = [*names, *variant.constants]
        raise BuildError(f"{variant.kernel} takes {kernel.arg_names}, but our tables list {listed}")
    signature = {argument.name: argument.type for argument in variant.arguments}
    signature |= dict.fromkeys(variant.constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, argument in enumerate(variant.arguments) if argument.is_aligned
    }
    source = ASTSource(kernel, signature, constexprs=dict(variant.constants), attrs=aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", _arch(sm), 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{variant.name} for SM {sm} needs scratch memory, which the library doesn't give")

    target = folder / f"sm_{_arch(sm)}"
    cubin = target / f"{variant.name}.cubin"
    _write(cubin, compiled.asm["cubin"])
    text = compiled.asm["ptx"].rstrip("\0").encode()
    _write(cubin.with_suffix(".ptx"), text)
    entry = {
        "name": variant.name,
        "kernel": variant.kernel,
        "match": dict(variant.match),
        "constants": dict(variant.constants),
        "arguments": [{"name": argument.name, "type": argument.type} for argument in variant.arguments],
        "grid": [{"sizes": list(sizes), "per": per} for sizes, per in KERNELS[variant.kernel].grid],
        "symbol": metadata.name,
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "ptx_sha256": hashlib.sha256(text).hexdigest(),
        "source_hash": source_hash(sm, variant),
        "resources": asdict(measure(cubin)),
    }
    if sm == PTX_SM:
        _write_entry(folder / "ptx", entry, "ptx", text)
    return _write_entry(target, entry, "cubin", compiled.asm["cubin"])


def _write_entry(folder: Path, entry: dict[str, Any], suffix: str, data: bytes) -> dict[str, Any]:
    name = f"{entry['name']}.{suffix}"
    _write(folder / name, data)
    facts = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    complete = json.loads(json.dumps({**entry, **facts}))  # as a reader of the file sees it
    _write(folder / f"{entry['name']}.json", json.dumps(complete, indent=1).encode())
    return dict(complete)


def _cached(folder: Path, variant: Variant, expected_hash: str) -> dict[str, Any] | None:
    """The entry that an earlier build left, if it is of these sources and its files are whole."""
    try:
        entry: dict[str, Any] = json.loads((folder / f"{variant.name}.json").read_bytes())
        files = {entry["file"]: entry["sha256"], f"{variant.name}.ptx": entry["ptx_sha256"]}
        is_whole = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == of for name, of in files.items())
        return entry if is_whole and entry["source_hash"] == expected_hash else None
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is no record
        return None


def _start_worker(cache: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C strikes all processes; the first stops the others
    for name in filter(_COMPILER_VARIABLES.fullmatch, list(os.environ)):
        del os.environ[name]  # TRITON_INTERPRET too: a kernel imported under it can't be compiled
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same cubin wherever the sources lie, and a smaller one


def problems(sm: str, entries: Iterable[dict[str, Any]]) -> list[str]:
    """What is wrong with the resources of one SM's variants, a sentence each."""
    found = []
    limit = SHARED_BYTES[FAMILIES[sm]]
    for entry in entries:
        name, kernel, used = entry["name"], entry["kernel"], Resources(**entry["resources"])
        if entry["shared_bytes"] > limit:
            found.append(f"{name} takes {entry['shared_bytes']} bytes of shared memory; SM {sm} has {limit}")
        if kernel in _TENSOR_CORE_KERNELS and not used.tensor_core_instructions:
            found.append(f"{name} for SM {sm} has no tensor-core instruction")
        is_accepted = kernel not in _NO_SPILL_KERNELS and any(
            fnmatch.fnmatch(sm, accepted_sm) and fnmatch.fnmatch(name, pattern)
            for accepted_sm, pattern in ACCEPTED_SPILLS
        )
        if used.spill_bytes and not is_accepted:
            found.append(f"{name} for SM {sm} spills {used.spill_bytes} bytes of each thread's registers")
    return found


def _write_manifest(folder: Path, target: str, entries: list[dict[str, Any]], suffix: str) -> None:
    """Writes the manifest and removes files of variants that are no more, told by their records."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "target": target,
        "triton": importlib.metadata.version("triton"),
        "variants": entries,
    }
    _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    names = {entry["name"] for entry in entries}
    for part in sorted(folder.glob(f"{_PART_PREFIX}*.part")):
        part.unlink()
    for record in sorted(folder.glob("*.json")):
        if record.stem not in {*names, "manifest"} and _is_record(record, suffix):
            for of in {suffix, "ptx"}:
                record.with_suffix(f".{of}").unlink(missing_ok=True)
            record.unlink()


def _is_record(path: Path, suffix: str) -> bool:
    """Whether a build wrote this file beside a variant's: nothing else is removed."""
    entry = _read_json(path)
    return isinstance(entry, dict) and "source_hash" in entry and entry.get("file") == f"{path.stem}.{suffix}"


def _refuse_foreign_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    if path.exists():
        manifest = _read_json(path)
        if not (isinstance(manifest, dict) and {"format_version", "target", "variants"} <= manifest.keys()):
            raise BuildError(f"{path} wasn't written by a build of the kernels; choose another folder, or move it away")


def _read_json(path: Path) -> object:
    """What a file holds; None: no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _compile_all(
    work: Sequence[tuple[str, Variant]], folder: Path, jobs: int | None
) -> dict[tuple[str, str], dict[str, Any]]:
    """The entries of variants, compiled in parallel; an error or Ctrl-C leaves out those that haven't begun."""
    entries = {}
    with (
        tempfile.TemporaryDirectory(prefix="qwen-aot-triton-") as cache,
        concurrent.futures.ProcessPoolExecutor(
            min(jobs or usable_cores(), len(work)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(cache,),
        ) as pool,
    ):
        pending = {pool.submit(compile_variant, sm, variant, folder): (sm, variant) for sm, variant in work}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(pending), 1):
                sm, variant = pending[future]
                entries[sm, variant.name] = _result(future, f"{variant.name} for SM {sm}")
                print(f"[{number}/{len(work)}] SM {sm} {variant.name}", file=sys.stderr)
        finally:
            pool.shutdown(cancel_futures=True)
    return entries


def _result(future: concurrent.futures.Future[dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return future.result()
    except (BuildError, OSError):
        raise
    except Exception as error:  # the compiler's own, of several libraries
        raise BuildError(f"{name} doesn't compile: {error}") from error


def build(
    sms: Sequence[str], folder: Path, *, only: str = "*", jobs: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Compiles all variants of some SMs whose names match the pattern `only`, and writes the manifests.

    Args:
        sms: Of `SMS`.
        folder: Where to write; what an earlier build left there is used again where it is still right.
        only: A pattern of variant names ("gqa_decode-*"). The manifest then lists these alone.
        jobs: Processes; the number of CPU cores by default.

    Returns:
        The manifest's entries of each SM, with `is_cached` added.

    Raises:
        BuildError: If an SM isn't known, nothing matches, a manifest there is someone else's, a variant doesn't
            compile, or its resources are wrong (`problems`).
        OSError: If the folder can't be written.
    """
    work = [(sm, variant) for sm in sms for variant in variants(sm) if fnmatch.fnmatch(variant.name, only)]
    if importlib.util.find_spec("triton") is None:
        raise BuildError(f"triton, which compiles kernels, isn't installed; {how_to_install('plugins')} (Linux only)")
    if not work:
        raise BuildError(f"no variant of SM {', '.join(sms)} has a name like {only!r}")
    targets = [folder / f"sm_{_arch(sm)}" for sm in sms] + ([folder / "ptx"] if PTX_SM in sms else [])
    for target in targets:
        _refuse_foreign_manifest(target)
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)

    entries: dict[tuple[str, str], dict[str, Any]] = {}
    missing = []
    for sm, variant in work:
        expected = source_hash(sm, variant)
        entry = _cached(folder / f"sm_{_arch(sm)}", variant, expected)
        if sm == PTX_SM and _cached(folder / "ptx", variant, expected) is None:
            entry = None
        if entry is None:
            missing.append((sm, variant))
        else:
            entries[sm, variant.name] = {**entry, "is_cached": True}
    if missing:
        compiled = _compile_all(missing, folder, jobs)
        entries |= {key: {**entry, "is_cached": False} for key, entry in compiled.items()}

    by_sm = {sm: [entries[sm, variant.name] for of, variant in work if of == sm] for sm in sms}
    for sm, listed in by_sm.items():
        written = [{key: value for key, value in entry.items() if key != "is_cached"} for entry in listed]
        _write_manifest(folder / f"sm_{_arch(sm)}", f"sm_{_arch(sm)}", written, "cubin")
        if sm == PTX_SM:
            as_ptx = [json.loads((folder / "ptx" / f"{entry['name']}.json").read_bytes()) for entry in listed]
            _write_manifest(folder / "ptx", f"sm_{_arch(sm)}", as_ptx, "ptx")
    found = [problem for sm, listed in by_sm.items() for problem in problems(sm, listed)]
    if found:
        raise BuildError(
            "the compiled kernels don't fit their SM; change the row in plugins/variants.py or, for a spill, give the"
            " reason in plugins/aot.py:\n  " + "\n  ".join(found)
        )
    return by_sm


def report(by_sm: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of what each variant takes."""
    lines = [
        "| SM | variant | warps | registers | spilled bytes | shared memory | tensor-core instructions | cubin bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sm, entries in by_sm.items():
        for entry in entries:
            used = Resources(**entry["resources"])
            cells = (sm, entry["name"], entry["num_warps"], used.registers, used.spill_bytes, entry["shared_bytes"])
            lines.append(f"| {' | '.join(map(str, (*cells, used.tensor_core_instructions, entry['bytes'])))} |")
    return "\n".join(lines)


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.aot",
        description="Compile the plugins' kernels ahead of time, with no GPU.",
        epilog="Examples:\n  python -m qwen_aot.plugins.aot -o build/kernels\n"
        "  python -m qwen_aot.plugins.aot --sm 8.9 --only 'gqa_decode-fp16-*' -o build/kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sm", action="append", choices=SMS, help="an SM, may be given again (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--only", default="*", help="pattern of variant names (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (default: the CPU cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        by_sm = build(arguments.sm or SMS, arguments.output, only=arguments.only, jobs=arguments.jobs)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that can't be written, a full disk
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was compiled is kept", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    count = sum(map(len, by_sm.values()))
    size = sum(entry["bytes"] for entries in by_sm.values() for entry in entries)
    print(json.dumps({"build_seconds": seconds, "variants": by_sm}) if arguments.json else report(by_sm))
    print(f"{count} variants, {size / 1e6:.1f} MB of cubin, {seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
