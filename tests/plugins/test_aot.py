import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import aot
from plugins.aot import build, problems, source_hash
from plugins.variants import variants
from qwen_aot_errors import BuildError

REPOSITORY = Path(__file__).parents[2]
ONLY = "gqa_[rd]e*-fp16-same-*"  # rotate is no match: decode for two head sizes and two group tiles


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plugins.aot", "-o", str(folder), "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


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
        f"gqa_decode-fp16-same-d{head_dim}-g{group}" for head_dim in (64, 128) for group in ("1_1", "2_16")
    ]
    for entry in manifest["variants"]:
        data = (folder / target / entry["file"]).read_bytes()
        assert entry["file"].endswith(suffix) and len(data) == entry["bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
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
    stale.write_bytes(b"")
    second = build(["12.1"], folder, only=ONLY, jobs=1)
    assert [entry["is_cached"] for entry in second["12.1"]] == [False, True, True, True]
    assert not any(entry["is_cached"] for entries in first["variants"].values() for entry in entries)
    assert damaged.read_bytes() == whole  # and a compilation can be repeated
    assert not stale.exists()


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
    with pytest.raises(BuildError, match=r"triton.*pip install 'qwen-aot\[plugins\]'"):
        aot.build(["8.9"], tmp_path)
    assert not any(tmp_path.iterdir())


def test_nothing_matches(tmp_path):
    with pytest.raises(BuildError, match=r"no variant of SM 8\.9 has a name like 'gqa_nothing'"):
        build(["8.9"], tmp_path, only="gqa_nothing")
    done = run(tmp_path, "--only", "gqa_nothing")
    assert done.returncode == 1 and done.stderr.startswith("error: no variant of SM 8.0, 8.6")
    assert run(tmp_path, "--sm", "7.5").returncode == 2
