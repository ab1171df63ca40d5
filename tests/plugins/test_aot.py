import ast
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins import aot
from qwen_aot.plugins.aot import build, problems, source_hash
from qwen_aot.plugins.signatures import KERNELS
from qwen_aot.plugins.variants import variants

REPOSITORY = Path(__file__).parents[2]
ONLY = "gqa_[rd]e*-fp16-same-d64-*"  # rotate is no match: decode for two group tiles


def run(
    folder: Path, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_aot.plugins.aot", "-o", str(folder), "--json", *arguments]
    complete = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=complete)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A developer's build of a few variants for two SMs, through the command line."""
    folder = tmp_path_factory.mktemp("kernels")
    done = run(folder, "--sm", "8.0", "--sm", "12.1", "--only", ONLY, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize(("target", "suffix"), [("sm_80", "cubin"), ("sm_121", "cubin"), ("ptx", "ptx")])
def test_manifest_describes_each_file(built, target, suffix):
    folder, _ = built
    manifest = json.loads((folder / target / "manifest.json").read_bytes())
    assert manifest["format_version"] == aot.FORMAT_VERSION
    assert [entry["name"] for entry in manifest["variants"]] == [
        f"gqa_decode-fp16-same-d64-g{group}" for group in ("1_1", "2_16")
    ]
    for entry in manifest["variants"]:
        data = (folder / target / entry["file"]).read_bytes()
        assert entry["file"].endswith(suffix) and len(data) == entry["bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        beside = (folder / target / f"{entry['name']}.ptx").read_bytes()
        assert hashlib.sha256(beside).hexdigest() == entry["ptx_sha256"]
        number = target.removeprefix("sm_") if suffix == "cubin" else "80"
        assert re.search(rf"^\.target sm_{number}a?$", beside.decode(), re.MULTILINE)
        assert entry["symbol"] == "gqa_decode" and entry["symbol"].encode() in data
        assert entry["arguments"][:2] == [{"name": "query_ptr", "type": "*fp16"}, {"name": "key_ptr", "type": "*fp16"}]
        assert entry["arguments"][-1] == {"name": "min_split", "type": "i32"}
        assert entry["grid"][1] == {"sizes": ["Hkv"], "per": 1}
        assert entry["num_warps"] == 4 and entry["shared_bytes"] > 0
        # One head multiplies and adds, a group uses tensor cores.
        has_tensor_cores = entry["resources"]["tensor_core_instructions"] > 0
        assert has_tensor_cores == entry["name"].endswith("g2_16")
        if suffix == "cubin":
            assert data[:4] == b"\x7fELF"


def test_ptx_is_portable_and_takes_two_more_pointers(built):
    folder, _ = built
    text = (folder / "ptx" / "gqa_decode-fp16-same-d64-g1_1.ptx").read_text()
    assert "\n.target sm_80\n" in text
    entry = json.loads((folder / "ptx" / "gqa_decode-fp16-same-d64-g1_1.json").read_bytes())
    assert text.count(".param .u64 .ptr") + text.count(".param .u32 gqa") + text.count(".param .f32") >= len(
        entry["arguments"]
    )
    assert f"gqa_decode_param_{len(entry['arguments']) + 1}" in text
    assert f"gqa_decode_param_{len(entry['arguments']) + 2}" not in text


def test_what_is_there_is_not_compiled_again_and_what_is_damaged_is(built):
    folder, first = built
    damaged = folder / "sm_121" / "gqa_decode-fp16-same-d64-g1_1.cubin"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    stale = folder / "sm_121" / "gone.cubin"
    for of in (stale, stale.with_suffix(".ptx")):
        of.write_bytes(b"")
    stale.with_suffix(".json").write_text('{"file": "gone.cubin", "source_hash": "of then"}')
    second = build(["12.1"], folder, only=ONLY, jobs=1)
    assert [entry["is_cached"] for entry in second["12.1"]] == [False, True]
    assert not any(entry["is_cached"] for entries in first["variants"].values() for entry in entries)
    assert damaged.read_bytes() == whole  # and a compilation can be repeated
    assert not any(stale.with_suffix(suffix).exists() for suffix in (".cubin", ".ptx", ".json"))


def test_the_ptx_of_a_cubin_is_whole_too(built):
    """What a cubin was assembled from is compiled again where it is missing or another."""
    folder, _ = built
    text = folder / "sm_121" / "gqa_decode-fp16-same-d64-g1_1.ptx"
    whole = text.read_bytes()
    variant = next(variant for variant in variants("12.1") if variant.name == text.stem)
    expected = source_hash("12.1", variant)
    assert aot._cached(text.parent, variant, expected) is not None
    text.write_bytes(whole + b"\n")
    assert aot._cached(text.parent, variant, expected) is None
    text.unlink()
    assert aot._cached(text.parent, variant, expected) is None
    text.write_bytes(whole)


def test_files_of_others_stay(tmp_path):
    mine = {
        "notes.json": "{}",
        "table.json": '{"file": "table.csv", "source_hash": ""}',
        "list.json": "[1]",
        "broken.json": "{",
        "mine.cubin": "",
        "download.part": "",
    }
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".qwen-aot-abc.part").touch()  # of a build that was killed
    aot._write_manifest(tmp_path, "sm_89", [], "cubin")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "manifest.json"}
    assert {name: (tmp_path / name).read_text() for name in mine} == mine


@pytest.mark.parametrize("content", ['{"name": "web app"}', "[]", "not json"])
@pytest.mark.parametrize("target", ["sm_80", "ptx"])
def test_a_manifest_of_others_is_refused_before_any_work(tmp_path, target, content):
    (tmp_path / target).mkdir()
    (tmp_path / target / "manifest.json").write_text(content)
    with pytest.raises(BuildError, match=r"manifest\.json wasn't written by a build of the kernels"):
        build(["8.0"], tmp_path, only=ONLY)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        target,
        f"{target}/manifest.json",
    ]
    assert (tmp_path / target / "manifest.json").read_text() == content


@pytest.mark.parametrize("record", ["", "null", "[1]", '{"file": 3}', '{"file": "gone.cubin"}', "{}"])
def test_a_damaged_record_is_no_record(built, record):
    folder, _ = built
    path = folder / "sm_121" / "gqa_decode-fp16-same-d64-g1_1.json"
    whole = path.read_bytes()
    variant = next(variant for variant in variants("12.1") if variant.name == path.stem)
    expected = source_hash("12.1", variant)
    assert aot._cached(path.parent, variant, expected) == json.loads(whole)
    file = {"file": f"{path.stem}.cubin"}
    for damaged in (record, json.dumps(file), json.dumps({**json.loads(whole), "source_hash": "another"})):
        path.write_text(damaged)
        assert aot._cached(path.parent, variant, expected) is None
    path.write_bytes(whole)


def test_hash_follows_what_a_kernel_imports_and_its_grid(tmp_path, monkeypatch):
    files = {
        "qwen_aot.plugins.kernels.moe_align": "from qwen_aot.plugins.kernels.helper import one\n",
        "qwen_aot.plugins.kernels.helper": "from qwen_aot.plugins.kernels.other import two\n",
        "qwen_aot.plugins.kernels.other": "import math\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        aot.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / name)})
    )
    variant = variants("8.9")[0]
    hashes = {source_hash("8.9", variant)}
    for number, name in enumerate(files, 2):
        (tmp_path / name).write_text(f"{files[name]}# changed\n")
        hashes.add(source_hash("8.9", variant))
        assert len(hashes) == number
    monkeypatch.setitem(
        aot.KERNELS, variant.kernel, dataclasses.replace(aot.KERNELS[variant.kernel], grid=((("E",), 2),))
    )
    assert source_hash("8.9", variant) not in hashes  # or the library would launch with the grid of an old entry


# What each kernel's module takes in, itself first; none takes in more than triton beside it.
SOURCES = {
    "gqa_rotate": {"gqa_rotate"},
    "gqa_decode": {"gqa_decode", "codes"},
    "gqa_prefill": {"gqa_prefill", "codes"},
    "moe_align": {"moe_align"},
    "timed": {"timed"},
    "moe_gemm": {"moe_gemm", "codes"},
    "linear_gemm": {"linear_gemm", "codes"},
}


def test_kernels_import_nothing_that_the_hash_does_not_cover():
    covered: dict[str, set[str]] = {}
    for kernel in KERNELS.values():
        covered.setdefault(kernel.module.split(".")[-1], set()).update(p.stem for p in aot._sources(kernel.module))
    assert covered == SOURCES
    for name, names in SOURCES.items():
        imported = set()
        for each in names:
            for node in ast.walk(ast.parse((Path(aot.__file__).parent / "kernels" / f"{each}.py").read_bytes())):
                if isinstance(node, ast.ImportFrom):
                    imported.add((node.level, node.module))
                elif isinstance(node, ast.Import):
                    imported |= {(0, alias.name) for alias in node.names}
        inside = {(0, f"qwen_aot.plugins.kernels.{other}") for other in names - {name}}
        assert imported == inside | {(0, "triton"), (0, "triton.language")}, name


def test_compiler_variables_of_the_environment_change_nothing(built, tmp_path):
    folder, _ = built
    name = "gqa_decode-fp16-same-d64-g1_1"
    environment = {"PTXAS_OPTIONS": "--opt-level=0", "TRITON_FORCE_DISABLE_FP_FUSION": "1"}
    done = run(tmp_path, "--sm", "12.1", "--only", name, environment=environment)
    assert done.returncode == 0, done.stderr
    file = f"sm_121/{name}.cubin"
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_ctrl_c_stops_soon_and_keeps_what_was_compiled(tmp_path):
    command = [sys.executable, "-m", "qwen_aot.plugins.aot", "-o", str(tmp_path), "--sm", "8.9", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # A session of its own: as at a terminal, all of its processes get the signal; and as there, none ignores it.
    with subprocess.Popen(
        command,
        text=True,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"[1/{len(variants('8.9'))}]")
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert rest[-1] == "interrupted; what was compiled is kept" and len(rest) <= 4  # the pool had taken a few more
    compiled = [path.stem for path in (tmp_path / "sm_89").glob("*.json")]
    assert 1 <= len(compiled) <= 8
    listed = {variant.name: variant for variant in variants("8.9")}
    assert all(
        aot._cached(tmp_path / "sm_89", listed[name], source_hash("8.9", listed[name])) is not None for name in compiled
    )
    assert not list(tmp_path.rglob("*.part"))


def test_a_kernel_that_does_not_compile_is_named(tmp_path, monkeypatch):
    broken = dataclasses.replace(variants("8.9")[0], constants={"BLOCK": 1000})  # no power of two
    monkeypatch.setattr(aot, "variants", lambda sm: (broken,))
    with pytest.raises(BuildError, match=r"moe_count for SM 8\.9 doesn't compile: (?s:.*)power of 2"):
        build(["8.9"], tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path, "-o", str(tmp_path / "file"))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path / 'file'}")
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aot.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        aot._write(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_spill_is_seen_in_the_machine_code(tmp_path, monkeypatch):
    """64 slots of an int8 cache, converted by 4 warps, are more than their registers hold."""
    (good,) = [variant for variant in variants("8.0") if variant.name == "gqa_prefill-fp16-int8-d128"]
    bad = dataclasses.replace(good, constants={**good.constants, "BLOCK_N": 64}, num_warps=4)
    monkeypatch.setattr(aot, "variants", lambda sm: (bad,))
    with pytest.raises(BuildError, match=r"gqa_prefill-fp16-int8-d128 for SM 8\.0 spills \d+ bytes"):
        build(["8.0"], tmp_path)


def test_hash_follows_source_constants_and_sm(tmp_path, monkeypatch):
    one, other = variants("8.9")[3:5]
    hashes = {source_hash("8.9", one), source_hash("8.6", one), source_hash("8.9", other)}
    changed = tmp_path / "kernel.py"
    changed.write_text("# another source")
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(changed)}))
    assert len(hashes | {source_hash("8.9", one)}) == 4


def entry(kernel: str, **resources: int) -> dict:
    used = {"registers": 100, "spill_bytes": 0, "tensor_core_instructions": 8, **resources}
    return {"name": f"{kernel}-x", "kernel": kernel, "shared_bytes": resources.get("shared", 0), "resources": used}


def test_problems_of_resources():
    assert problems("8.9", [entry("gqa_prefill"), entry("moe_sum", tensor_core_instructions=0)]) == []
    (found,) = problems("8.9", [entry("moe_down", tensor_core_instructions=0)])
    assert found == "moe_down-x for SM 8.9 has no tensor-core instruction"
    (found,) = problems("8.9", [entry("gqa_decode", spill_bytes=16)])
    assert found == "gqa_decode-x for SM 8.9 spills 16 bytes of each thread's registers"
    too_large = {**entry("gqa_prefill"), "shared_bytes": 100 * 1024}
    (found,) = problems("8.9", [too_large])
    assert found == "gqa_prefill-x takes 102400 bytes of shared memory; SM 8.9 has 101376"
    assert problems("8.0", [too_large]) == []


def test_accepted_spills_have_a_reason_and_never_cover_decode(monkeypatch):
    assert all(len(reason) > 20 for reason in aot.ACCEPTED_SPILLS.values())
    monkeypatch.setattr(aot, "ACCEPTED_SPILLS", {("8.*", "*"): "for this test"})
    assert problems("8.9", [entry("gqa_prefill", spill_bytes=16)]) == []
    assert problems("9.0", [entry("gqa_prefill", spill_bytes=16)])
    assert problems("8.9", [entry("gqa_decode", spill_bytes=16)])


def test_without_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"triton.*pip install -e \S+\[plugins\]'"):
        aot.build(["8.9"], tmp_path)
    assert not any(tmp_path.iterdir())


def test_nothing_matches(tmp_path):
    with pytest.raises(BuildError, match=r"no variant of SM 8\.9 has a name like 'gqa_nothing'"):
        build(["8.9"], tmp_path, only="gqa_nothing")
    done = run(tmp_path, "--only", "gqa_nothing")
    assert done.returncode == 1 and done.stderr.startswith("error: no variant of SM 8.0, 8.6")
    assert run(tmp_path, "--sm", "7.5").returncode == 2
