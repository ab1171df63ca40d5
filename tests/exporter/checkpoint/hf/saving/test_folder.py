"""The writer of quantized folders: what is read back, and what becomes of a job that is killed or changed."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.checkpoint.hf.saving import folder as saving
from qwen_aot.exporter.checkpoint.hf.saving.folder import SEAL_NAME, QuantizedFolder
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, Tensor, WeightClass
from tests.checkpoints import save_tiny, tiny_config
from tests.gguf_files import save_gguf
from tests.quantized_files import load_tensors
from tests.saved_folders import (
    EMBEDDING,
    HALF,
    HEAD,
    MATRICES,
    REQUEST,
    codes_of,
    form,
    forms_of,
    of_layer,
    same,
    write,
)

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 128, "kv_heads": 2}
MOE: dict[str, Any] = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}
FORMATS = [("gptq", False), ("gptq", True), ("awq", True), ("compressed-tensors", False), ("compressed-tensors", True)]


def save(folder: Path, **config: Any) -> Path:
    save_tiny(folder, **({"dtype": "bfloat16"} | SIZES | config))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense"), with_tokenizer=True, vocab=320)


@pytest.fixture(scope="module")
def sources(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    model = save_tiny(folder / "model", **SIZES)
    save_gguf(folder / "model.gguf", model, "qwen2")
    qwen3_moe = {key: value for key, value in MOE.items() if not key.startswith("shared")}
    return {
        "dense": dense,
        "experts": save(folder / "moe", moe=MOE, layers=2),
        "gguf": folder / "model.gguf",
        "qwen3": save(folder / "qwen3", generation="qwen3", head_dim=32),
        "qwen3-moe": save(folder / "qwen3-moe", generation="qwen3", moe=qwen3_moe, layers=2),
    }


def mixed(format_name: str, zero_points: bool, tensor: Tensor) -> CodeForm:
    if format_name == "awq":
        return form(zero_points=True)
    if tensor.role.weight_class is WeightClass.DOWN:
        return form(8, 32, zero_points=zero_points)
    if tensor.role is Role.OUTPUT:
        return form(4, 64, zero_points=zero_points)  # one a row
    return form(4, 16 if tensor.layer else 32, zero_points=zero_points)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def neighbours(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("source", ["dense", "experts", "gguf", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize(("format_name", "zero_points"), FORMATS)
def test_a_folder_gives_back_every_number(
    source: str, format_name: str, zero_points: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with open_checkpoint(sources[source]) as checkpoint:
        forms = forms_of(checkpoint, lambda tensor: mixed(format_name, zero_points, tensor))
        codes = write(out, checkpoint, format_name, forms)
        assert neighbours(out) == []
        with open_checkpoint(out) as written:
            assert written.tensors.keys() == checkpoint.tensors.keys()
            for name in written.tensors:
                if name in codes:
                    assert same(written.read_encoded(name), codes[name]), name
                else:
                    stored = written.read(name)
                    assert stored.dtype == np.float16
                    assert stored.tobytes() == checkpoint.read(name).astype(np.float16).tobytes(), name
            assert written.tokenizer.files == checkpoint.tokenizer.files
            known = {"torch_dtype": "float16", "eos_token_ids": checkpoint.config.eos_token_ids}
            assert {key: getattr(written.config, key) for key in known} == known
            for key in (
                "model_type",
                "rope_theta",
                "moe",
                "max_position_embeddings",
                "attention_bias",
                "tie_word_embeddings",
            ):
                assert getattr(written.config, key) == getattr(checkpoint.config, key), key
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "np") as file:  # the public package reads what we wrote
            assert {name for name, each in index["weight_map"].items() if each == shard.name} == set(file.keys())


@pytest.mark.parametrize("code_type", CodeType)
def test_a_folder_with_rounded_inputs_gives_back_every_number(code_type: CodeType, dense: Path, tmp_path: Path) -> None:
    """W8A8, one matrix left plain: codes by the public package too, where integers are signed."""
    with open_checkpoint(dense) as checkpoint:
        of_rows = functools.partial(CodeForm, 8, scale_dtype=HALF, has_input_scale=True, code_type=code_type)
        every = forms_of(checkpoint, lambda tensor: of_rows(group_size=tensor.shape[1]))
        plain = next(name for name in every if "down_proj" in name)
        forms = {name: each for name, each in every.items() if name != plain}
        codes = write(tmp_path / "out", checkpoint, "compressed-tensors", forms)
        with open_checkpoint(tmp_path / "out") as written:
            for name, rows in codes.items():
                assert same(written.read_encoded(name), rows), name
            assert written.tensors[plain].encoding is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert plain.removesuffix(".weight") in config["ignore"]
    is_float = code_type is CodeType.E4M3
    assert config["format"] == ("float-quantized" if is_float else "int-quantized")
    for key in ("input_activations", "weights"):
        assert config["config_groups"]["group_0"][key]["type"] == ("float" if is_float else "int")
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"
    name, rows = next(iter(codes.items()))
    stored = load_tensors(tmp_path / "out" / "model-00001-of-00003.safetensors")
    if is_float:
        assert stored[name].dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(stored[name].view(np.uint8), rows.codes)
    else:
        assert stored[name].dtype == np.int8
        np.testing.assert_array_equal(stored[name], rows.codes.astype(np.int16) - 128)
    assert stored[name.replace("weight", "input_scale")].tolist() == [rows.input_scale]


def test_tensors_may_be_given_anew(dense: Path, tmp_path: Path) -> None:
    norm = Role.INPUT_NORM.tensor_name(1)
    with open_checkpoint(dense) as checkpoint:
        values = np.linspace(-2, 2, 64, dtype=np.float32)
        write(tmp_path / "out", checkpoint, "gptq", forms_of(checkpoint), plain={norm: values})
    with open_checkpoint(tmp_path / "out") as written:
        assert written.read(norm).tobytes() == values.astype(np.float16).tobytes()


def test_a_model_without_biases_gets_zeros(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", **SIZES)
    save_gguf(tmp_path / "model.gguf", model, "llama")
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert not checkpoint.config.attention_bias
        write(tmp_path / "out", checkpoint, "gptq", forms_of(checkpoint))
    with open_checkpoint(tmp_path / "out") as written:
        assert written.config.attention_bias
        assert not written.read(Role.KEY_BIAS.tensor_name(1)).any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("zero_points", [False, True])
def test_embedding_and_head_as_codes(tied: bool, zero_points: bool, tmp_path: Path) -> None:
    save(tmp_path / "model", tied=tied)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        classes = (*MATRICES, WeightClass.EMBEDDING, WeightClass.HEAD)
        forms = forms_of(checkpoint, lambda tensor: form(4 if tensor.layer is not None else 8, 32), classes)
        forms |= {EMBEDDING: form(8, 16, zero_points=zero_points)}
        codes = write(tmp_path / "out", checkpoint, "compressed-tensors", forms)
    with open_checkpoint(tmp_path / "out") as written:
        assert written.config.tie_word_embeddings == tied
        assert (HEAD in written.tensors) != tied
        for name in codes:
            assert same(written.read_encoded(name), codes[name]), name


def test_values_that_fp16_cant_hold_make_the_rest_bf16(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", dtype="bfloat16", **SIZES)
    model.model.norm.weight.data[3] = 70000.0
    model.save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        write(tmp_path / "out", checkpoint, "gptq", forms_of(checkpoint))
        with pytest.raises(BuildError, match=r"norm.weight holds 70144 in row 3, which float16 doesn't; accepted"):
            write(tmp_path / "half", checkpoint, "gptq", forms_of(checkpoint), dtype="float16")
    with open_checkpoint(tmp_path / "out") as written:
        assert written.config.torch_dtype == "bfloat16"
        assert written.read("model.norm.weight").dtype.name == "bfloat16"
        assert written.read("model.norm.weight")[3] == 70144


def job(out: Path, checkpoint: Any, layers: int, request: Any = REQUEST, **options: Any) -> None:
    """A job that stops after some layers."""
    forms = forms_of(checkpoint)
    codes = codes_of(checkpoint, forms)
    with QuantizedFolder(out, checkpoint, "gptq", request=request, **options) as folder:
        folder.begin(forms)
        for layer in range(folder.layers_done, layers):
            folder.add_layer(layer, of_layer(codes, layer))
        folder.state_path("hidden-1").write_bytes(b"x")


def test_a_job_goes_on_at_its_first_missing_layer(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        write(tmp_path / "whole", checkpoint, "gptq", forms_of(checkpoint))
        job(out, checkpoint, 1)
        assert not out.exists()
        assert neighbours(out) == [".out.quantizing"]
        with QuantizedFolder(out, checkpoint, "gptq", request=REQUEST) as folder:
            assert folder.layers_done == 1
            assert folder.forms == forms_of(checkpoint)
            assert folder.state_path("hidden-1").read_bytes() == b"x"
        write(out, checkpoint, "gptq", forms_of(checkpoint))
    assert contents(out) == contents(tmp_path / "whole")
    assert neighbours(out) == []


def test_another_job_is_told_apart(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        job(out, checkpoint, 1)
        with pytest.raises(BuildError, match=r"with seed 0, and this one has 1; give the same, or .* --restart"):
            job(out, checkpoint, 1, REQUEST | {"seed": 1})
        with pytest.raises(BuildError, match=r'with format "gptq", and this one has "awq"'):
            write(out, checkpoint, "awq", forms_of(checkpoint))
        forms = forms_of(checkpoint) | {Role.DOWN.tensor_name(1): form(8)}
        with pytest.raises(BuildError, match=r"down_proj.weight as 4 bits .* and this one has it as 8 bits"):
            write(out, checkpoint, "gptq", forms)
        job(out, checkpoint, 0, REQUEST | {"seed": 1}, restart=True)
        with QuantizedFolder(out, checkpoint, "gptq", request=REQUEST | {"seed": 1}) as folder:
            assert folder.layers_done == 0


@pytest.mark.parametrize("damage", ["content", "missing", "record"])
def test_a_damaged_job_is_no_start(damage: str, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        job(out, checkpoint, 1)
        shard = tmp_path / ".out.quantizing" / "folder" / "model-00001-of-00003.safetensors"
        if damage == "content":
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        elif damage == "missing":
            shard.unlink()
        else:
            (tmp_path / ".out.quantizing" / "job.json").write_text('{"request": 3}')
        with pytest.raises(BuildError, match=r"(isn't as it was written|is damaged).*--restart"):
            job(out, checkpoint, 2)
        write(out, checkpoint, "gptq", forms_of(checkpoint), restart=True)
    assert neighbours(out) == []


def test_a_job_that_a_version_without_types_of_codes_began_goes_on(dense: Path, tmp_path: Path) -> None:
    """Its record has five values for each matrix, all of integers; one with a value too few is damaged."""
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        job(out, checkpoint, 1)
        path = tmp_path / ".out.quantizing" / "job.json"
        record = json.loads(path.read_text())
        record["forms"] = {name: values[:5] for name, values in record["forms"].items()}
        path.write_text(json.dumps(record))
        job(out, checkpoint, 2)
        record["forms"] = {name: values[:4] for name, values in record["forms"].items()}
        path.write_text(json.dumps(record))
        with pytest.raises(BuildError, match="is damaged"):
            job(out, checkpoint, 2)


def test_a_job_with_nothing_done_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    with open_checkpoint(dense) as checkpoint, pytest.raises(BuildError, match="has no zero points"):
        write(tmp_path / "out", checkpoint, "awq", forms_of(checkpoint))
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_at_once_are_refused(dense: Path, tmp_path: Path) -> None:
    with open_checkpoint(dense) as checkpoint:
        first = QuantizedFolder(tmp_path / "out", checkpoint, "gptq", request=REQUEST)
        with first, pytest.raises(BuildError, match=rf"process {os.getpid()}\) is writing"):
            job(tmp_path / "out", checkpoint, 1)
        job(tmp_path / "out", checkpoint, 1)


@pytest.mark.parametrize("what", ["file", "folder", "bundle of notes", "changed", "in the way"])
def test_what_isnt_ours_is_not_replaced(what: str, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        if what == "file":
            out.write_text("mine")
        elif what == "folder":
            out.mkdir()
            (out / "notes").touch()
        elif what == "in the way":
            (tmp_path / ".out.quantizing").mkdir()
            (tmp_path / ".out.quantizing" / "notes").touch()
        else:
            write(out, checkpoint, "gptq", forms_of(checkpoint))
            (out / ("notes" if what == "bundle of notes" else "config.json")).write_text("mine")
        expected = {
            "file": "is a file; give a folder",
            "folder": f"isn't a folder that was quantized here .no {SEAL_NAME}",
            "bundle of notes": "doesn't list .notes.",
            "changed": "config.json isn't as it was written",
            "in the way": "is in the way, and no job left it there",
        }
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BuildError, match=expected[what]):
            write(out, checkpoint, "gptq", forms_of(checkpoint))
        assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_ours_is_replaced(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        write(out, checkpoint, "gptq", forms_of(checkpoint))
        write(out, checkpoint, "compressed-tensors", forms_of(checkpoint))
    assert "compressed-tensors" in (out / "config.json").read_text()
    assert neighbours(out) == []


def test_space_is_asked_for_before_the_first_layer(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_disk_bytes", lambda out: 40 << 20)
    with (
        open_checkpoint(dense) as checkpoint,
        QuantizedFolder(tmp_path / "out", checkpoint, "gptq", request=REQUEST) as folder,
    ):
        folder.begin(forms_of(checkpoint))
        with pytest.raises(BuildError, match=r"needs about [0-9,]+ more bytes of disk space, and 41,943,040 are free"):
            folder.begin(forms_of(checkpoint), state_bytes=20 << 20)


def test_a_full_disk_keeps_what_is_done(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with open_checkpoint(dense) as checkpoint:
        job(out, checkpoint, 1)

        def full(fd: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(BuildError, match=r"no space left .* goes on where it stopped"):
                job(out, checkpoint, 2)
        with QuantizedFolder(out, checkpoint, "gptq", request=REQUEST) as folder:
            assert folder.layers_done == 1
            assert [path.name for path in folder.folder.iterdir()] == ["model-00001-of-00003.safetensors"]


def test_the_space_that_is_asked_for_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_config(tmp_path)
    checkpoint = RandomCheckpoint(config)
    asked: list[int] = []
    monkeypatch.setattr(saving, "_SMALL_FILES", 0)
    monkeypatch.setattr(saving, "free_disk_bytes", lambda out: 0)
    for format_name, zero_points in FORMATS:
        forms = forms_of(checkpoint, lambda tensor, f=format_name, z=zero_points: mixed(f, z, tensor))
        out = tmp_path / f"{format_name}-{zero_points}"
        with pytest.raises(BuildError) as raised:
            write(out, checkpoint, format_name, forms)
        asked.append(int(str(raised.value).partition("about ")[2].partition(" more")[0].replace(",", "")))
        with monkeypatch.context() as patch:
            patch.setattr(saving, "free_disk_bytes", lambda out: 1 << 40)
            write(out, checkpoint, format_name, forms)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] <= asked[-1] <= 1.2 * index["metadata"]["total_size"]


def open_config(tmp_path: Path) -> ModelConfig:
    tiny_config(**SIZES).save_pretrained(tmp_path / "config")
    return read_folder(tmp_path / "config")[0]


# The child's children die at their n-th file operation (audit events of the interpreter); the job is then given again.
CHILD = textwrap.dedent(
    """
    import os, shutil, signal, sys
    from pathlib import Path
    from qwen_aot.exporter.checkpoint.hf.config import read_folder
    from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
    from tests.saved_folders import REQUEST, forms_of, write

    root, step = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = RandomCheckpoint(read_folder(root / "config")[0])
    forms = forms_of(checkpoint)

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    write(root / "whole", checkpoint, "gptq", forms)
    whole = contents(root / "whole")
    point = killed = 0
    while True:
        place = root / str(point)
        place.mkdir()
        out = place / "out"
        write(out, checkpoint, "gptq", forms, REQUEST | {"seed": 1})  # what stood there before
        old = contents(out)
        pid = os.fork()
        if pid == 0:
            events = 0

            def count(event, arguments):
                global events
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.truncate"):
                    events += 1
                    if events == point + 1:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            write(out, checkpoint, "gptq", forms)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert contents(out) in (old, whole), point
        write(out, checkpoint, "gptq", forms)
        assert contents(out) == whole, point
        assert sorted(path.name for path in place.iterdir()) == ["out"], point
        shutil.rmtree(place)
        if status == 0:
            break
        killed += 1
        point += step
    print(killed)
    """
)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.deep)])
def test_a_kill_at_any_moment_changes_nothing_of_the_result(step: int, tmp_path: Path) -> None:
    open_config(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(step)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[5],
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 60 // step  # lock, record, shards, their renames, small files, exchange, deletion
