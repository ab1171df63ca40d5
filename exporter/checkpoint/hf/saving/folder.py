"""The writer of a quantized folder: a shard a layer, kept after a kill, and moved into place when all is there.

Beside `out` lies `.{out}.quantizing` meanwhile:

    job.json   what was asked for, and the hashes of what is whole
    folder/    the new folder
    state/     what the algorithm keeps to go on

The finished folder has `qwen_aot_quantization.json` beside what its format has: the request, and every file's hash.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.checkpoint.hf.folder import HfFolderCheckpoint
from qwen_aot.exporter.checkpoint.hf.safetensors import INDEX_NAME
from qwen_aot.exporter.checkpoint.hf.saving.config_json import saved_config
from qwen_aot.exporter.checkpoint.hf.saving.formats import saved_format
from qwen_aot.exporter.checkpoint.hf.saving.job import Job, read_job, require_same, require_same_forms
from qwen_aot.exporter.checkpoint.hf.saving.matrix import SCALE_DTYPE, Matrix
from qwen_aot.exporter.checkpoint.hf.saving.plain import copied, given, plain_dtype, zeros
from qwen_aot.exporter.checkpoint.hf.saving.tensor_file import StoredTensor, stored, write_tensors
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, Tensor, WeightClass, checkpoint_tensors
from qwen_aot.machine import free_disk_bytes
from qwen_aot.version import __version__
from qwen_aot.whole_file import file_sha256, write_whole
from qwen_aot.whole_folder import FolderWriter, explained, refuse_unless_as_written

if TYPE_CHECKING:
    from typing_extensions import Self

SEAL_NAME = "qwen_aot_quantization.json"
QUANTIZER = f"qwen-aot:{__version__}"
_NOT_QUANTIZED = frozenset({WeightClass.NORM, WeightClass.BIAS, WeightClass.DECIDING})
_ADVICE = "give another folder, or move this one away; delete it, if nothing in it is yours"
WHEN_FULL = ", and give the same command again: it goes on where it stopped"
_SMALL_FILES = 32 << 20  # headers of shards, tokenizer, configuration


class QuantizedFolder(FolderWriter):
    """Context manager of one job: `begin`, `add_layer` from `layers_done` on, `finish`.

    Leaving earlier, or being killed, keeps what is whole; the same job goes on there.

        with QuantizedFolder(out, checkpoint, "gptq", request={"algorithm": "rtn", "seed": 0}) as folder:
            folder.begin(forms)
            for layer in range(folder.layers_done, folder.num_layers):
                folder.add_layer(layer, {name: rows, ...})
            folder.finish()

    Tensors that are given neither as codes nor as numbers are the checkpoint's.

    Args:
        out: the folder to make; or to replace, if it is empty or one of ours.
        checkpoint: what is quantized.
        format_name: one of `formats.SAVED_FORMATS`.
        request: JSON-able facts of the job: algorithm, options, seed. An unfinished job goes on only if they are equal,
            and so are format, checkpoint (by its headers) and version of this program, which are added here.
        restart: an unfinished job is given up.

    Raises:
        BuildError: the format isn't known; on entry, if `out` can't be written or isn't ours to replace, another
            process writes there, or an unfinished job is another one or damaged.
    """

    def __init__(
        self,
        out: Path,
        checkpoint: Checkpoint,
        format_name: str,
        *,
        request: Mapping[str, Any],
        restart: bool = False,
    ) -> None:
        super().__init__(out, _refuse_unless_ours, suffix="quantizing", keeps=True)
        self._checkpoint = checkpoint
        self._format = saved_format(format_name)
        self._restart = restart
        facts = {"format": format_name, "checkpoint": checkpoint.source["sha256"], "made_by": QUANTIZER}
        self._job = Job(json.loads(json.dumps(dict(request) | facts)))
        self._job_path = self.aside / "job.json"
        self._matrices: dict[str, Matrix] = {}
        self._of_layer: dict[int | None, list[Tensor]] = {}
        for tensor in checkpoint_tensors(checkpoint.config.as_in_transformers):
            self._of_layer.setdefault(tensor.layer, []).append(tensor)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            with explained(self.out, WHEN_FULL):
                self._open_job()
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._job_path.exists() and not self._job.files and not self._has_state():
            with contextlib.suppress(OSError):
                self._job_path.unlink()  # nothing to go on with
        super().__exit__(kind, error, trace)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self._checkpoint.config.num_hidden_layers

    @property
    def layers_done(self) -> int:
        """Layers that are whole, from the first on."""
        return next((n for n in range(self.num_layers) if self._shard(n) not in self._job.files), self.num_layers)

    @property
    def forms(self) -> Mapping[str, CodeForm] | None:
        """What an unfinished job began with; None: it hadn't begun, or this is a new one."""
        return self._job.forms

    @property
    def dtype(self) -> str:
        """Of the tensors that aren't codes, once `begin` decided it: `float16` or `bfloat16`."""
        assert self._job.dtype is not None, "begin first"
        return self._job.dtype

    def state_path(self, name: str) -> Path:
        """Where the algorithm keeps a file of its own until the folder is finished.

        To go on after a kill at any moment, write whole what layer n + 1 begins with, under a name with its number,
        before `add_layer(n, ...)`; delete that of layer n after it.

        Args:
            name: a plain file name.
        """
        assert Path(name).name == name
        folder = self.aside / "state"
        folder.mkdir(exist_ok=True)
        return folder / name

    def begin(self, forms: Mapping[str, CodeForm], *, dtype: str | None = None, state_bytes: int = 0) -> None:
        """Decides how everything is stored. Before the first layer, also of a job that goes on.

        Args:
            forms: of every matrix that becomes codes, by its tensor's name.
            dtype: of the other tensors, `float16` or `bfloat16`; None: float16 where it holds all their values, for
                which they are read.
            state_bytes: disk space that the algorithm's own files take.

        Raises:
            BuildError: the format can't store them (named), the disk is too small, or the unfinished job's are others.
            CheckpointError: the checkpoint can't be read.
        """
        job = self._job
        if job.forms is not None:
            require_same_forms(self.aside, job.forms, forms)
        self._matrices = _matrices(self._checkpoint.config, forms)
        self._format.check(list(self._matrices.values()))
        tensors = [tensor for part in self._of_layer.values() for tensor in part]
        plain = [tensor for tensor in tensors if tensor.name not in forms]
        self._require_space(plain, state_bytes)
        if job.dtype is None:
            stored_names = [tensor.name for tensor in plain if tensor.name in self._checkpoint.tensors]
            job.dtype = dtype or plain_dtype(self._checkpoint, stored_names)
        elif dtype not in (None, job.dtype):
            require_same(self.aside, {"dtype": job.dtype}, {"dtype": dtype})
        job.forms = dict(forms)
        self._write_job()

    def add_layer(
        self, layer: int, encoded: Mapping[str, EncodedRows], plain: Mapping[str, np.ndarray[Any, Any]] | None = None
    ) -> None:
        """Writes one layer's shard; when it returns, a kill doesn't lose it.

        Args:
            layer: the first that isn't done.
            encoded: every matrix of the layer that `begin` was told of, all rows of it.
            plain: other tensors of the layer that aren't the checkpoint's any more, of any floating type.

        Raises:
            BuildError: a number doesn't fit its type, or the file can't be written.
        """
        assert layer == self.layers_done < self.num_layers
        self._add_shard(layer, encoded, plain or {})

    def finish(
        self,
        encoded: Mapping[str, EncodedRows] | None = None,
        plain: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> None:
        """Writes what is outside the layers and all small files, and moves the folder into place.

        Args:
            encoded: head and embedding, where `begin` was told of them.
            plain: other tensors outside the layers that aren't the checkpoint's any more.

        Raises:
            BuildError: a number doesn't fit its type, or a file can't be written.
        """
        assert self.layers_done == self.num_layers
        self._add_shard(None, encoded or {}, plain or {})
        with explained(self.out, WHEN_FULL):
            self._write_small_files()
            self._check_written()
        self.commit()

    def _open_job(self) -> None:
        if self._restart:
            self._clear()
        if self._job_path.exists():
            job = read_job(self._job_path)
            require_same(self.aside, job.request, self._job.request)
            if _request_of(self.out) == job.request:
                self._clear()  # killed after it was moved into place: what is here is what stood there before
            else:
                for name, (size, sha256) in job.files.items():
                    path = self.folder / name
                    if not path.is_file() or path.stat().st_size != size or file_sha256(path) != sha256:
                        raise BuildError(
                            f"{path}, of an unfinished job, isn't as it was written (changed, or damaged); start anew "
                            "with --restart"
                        )
                self._job = job
                for path in self.folder.iterdir():
                    if path.name not in job.files:
                        path.unlink()  # what was being written
        self._write_job()

    def _clear(self) -> None:
        shutil.rmtree(self.aside)
        self.folder.mkdir(parents=True)

    def _write_job(self) -> None:
        with explained(self.out, WHEN_FULL):
            self._job.write(self._job_path)

    def _has_state(self) -> bool:
        return any((self.aside / "state").glob("*"))

    def _refuse_in_the_way(self) -> None:
        super()._refuse_in_the_way()
        if self.aside.exists() and not self._job_path.exists():
            raise BuildError(f"{self.aside} is in the way, and no job left it there: move it away, or rename it")

    def _recover(self) -> None:
        super()._recover()
        if self.aside.exists() and not self._job_path.exists():
            shutil.rmtree(self.aside)

    def _shard(self, layer: int | None) -> str:
        number = self.num_layers if layer is None else layer
        return f"model-{number + 1:05d}-of-{self.num_layers + 1:05d}.safetensors"

    def _require_space(self, plain: list[Tensor], state_bytes: int) -> None:
        needed = sum(matrix.packed_bytes for matrix in self._matrices.values())
        needed += sum(2 * math.prod(tensor.shape) for tensor in plain) + state_bytes + _SMALL_FILES
        needed -= sum(size for size, _ in self._job.files.values())
        free = free_disk_bytes(self.out)
        if needed > free:
            raise BuildError(
                f"{self.out} needs about {needed:,} more bytes of disk space, and {free:,} are free; free some space, "
                "or give a folder on another disk"
            )

    def _add_shard(
        self, layer: int | None, encoded: Mapping[str, EncodedRows], plain: Mapping[str, np.ndarray[Any, Any]]
    ) -> None:
        dtype = self._job.dtype
        assert dtype is not None, "begin first"
        names = {tensor.name for tensor in self._of_layer[layer]}
        assert encoded.keys() == names & self._matrices.keys(), "every matrix of the layer as codes, and no other"
        assert plain.keys() <= names - encoded.keys(), "other tensors of the layer alone"
        tensors: dict[str, StoredTensor] = {}
        for tensor in self._of_layer[layer]:
            if tensor.name in encoded:
                matrix = self._matrices[tensor.name]
                _check_rows(matrix, encoded[tensor.name])
                for part, array in self._format.pack(encoded[tensor.name]).items():
                    tensors[f"{matrix.module}.{part}"] = stored(array)
            elif tensor.name in plain:
                assert plain[tensor.name].shape == tensor.shape, tensor.name
                tensors[tensor.name] = given(tensor.name, plain[tensor.name], dtype)
            elif tensor.name in self._checkpoint.tensors:
                tensors[tensor.name] = copied(self._checkpoint, tensor.name, dtype)
            else:
                tensors[tensor.name] = zeros(tensor.shape, dtype)
        shard = self._shard(layer)
        with explained(self.out, WHEN_FULL):
            self._job.files[shard] = write_tensors(self.folder / shard, tensors, {"quantizer": QUANTIZER})
        self._write_job()

    def _write_small_files(self) -> None:
        job, config = self._job, self._checkpoint.config
        assert job.dtype is not None
        quantization = self._format.configuration(
            list(self._matrices.values()), _plain_linears(config, self._matrices), QUANTIZER
        )
        facts = saved_config(self._checkpoint, job.dtype, quantization, tie_word_embeddings=config.tie_word_embeddings)
        sizes = {shard: _tensor_bytes(self.folder / shard) for shard in sorted(job.files)}
        weight_map = {name: shard for shard, of_shard in sizes.items() for name in sorted(of_shard)}
        total = sum(sum(of_shard.values()) for of_shard in sizes.values())
        texts = dict(self._checkpoint.tokenizer.files) | {
            "config.json": _json(facts),
            INDEX_NAME: _json({"metadata": {"total_size": total}, "weight_map": weight_map}),
        }
        for name, text in texts.items():
            write_whole(self.folder / name, text.encode("utf-8"))
        files = dict(job.files)
        for name in texts:
            path = self.folder / name
            files[name] = (path.stat().st_size, file_sha256(path))
        write_whole(self.folder / SEAL_NAME, _json({"request": job.request, "files": files}).encode("utf-8"))

    def _check_written(self) -> None:
        """The folder opens with this project's reader, and has the codes in the forms that were asked for."""
        with HfFolderCheckpoint(self.folder) as written:
            found = {name: info.encoding for name, info in written.tensors.items() if info.encoding is not None}
            forms = {name: encoding.form for name, encoding in found.items()}
        assert forms == {name: matrix.form for name, matrix in self._matrices.items()}


def _matrices(config: ModelConfig, forms: Mapping[str, CodeForm]) -> dict[str, Matrix]:
    """In the order of the checkpoint's table."""
    found: dict[str, Matrix] = {}
    for tensor in checkpoint_tensors(config):
        if tensor.name in forms:
            assert tensor.role.weight_class not in _NOT_QUANTIZED, tensor.name
            n, k = tensor.shape
            found[tensor.name] = Matrix(tensor.name, tensor.role, (n, k), forms[tensor.name])
    assert found.keys() == forms.keys(), "matrices of this model alone"
    assert found, "something to quantize"
    return found


def _plain_linears(config: ModelConfig, matrices: Mapping[str, Matrix]) -> list[str]:
    """Modules that libraries take for linears to be quantized, and that stay plain."""
    plain = [
        tensor.name.removesuffix(".weight")
        for tensor in checkpoint_tensors(config)
        if tensor.role.weight_class not in (WeightClass.NORM, WeightClass.BIAS, WeightClass.EMBEDDING)
        and tensor.name not in matrices
    ]
    head = Role.HEAD.tensor_name().removesuffix(".weight")
    return [*plain, head] if config.tie_word_embeddings else plain


def _check_rows(matrix: Matrix, rows: EncodedRows) -> None:
    """What a packer would spoil its neighbours with."""
    groups = (matrix.shape[0], matrix.groups)
    assert rows.form == matrix.form, matrix.name
    assert rows.permutation is None, matrix.name
    assert rows.codes.shape == matrix.shape, matrix.name
    assert rows.codes.dtype == np.uint8, matrix.name
    assert rows.codes.max(initial=0) < 1 << matrix.form.bits, matrix.name
    assert rows.scales.shape == groups, matrix.name
    assert rows.scales.dtype == SCALE_DTYPE, matrix.name
    assert (rows.zero_points is not None) == matrix.form.has_zero_points, matrix.name
    assert (rows.input_scale is not None) == matrix.form.has_input_scale, matrix.name
    if rows.zero_points is not None:
        assert rows.zero_points.shape == groups, matrix.name
        assert rows.zero_points.dtype == np.uint8, matrix.name
        assert rows.zero_points.max(initial=0) < 1 << matrix.form.bits, matrix.name
    if not np.isfinite(rows.scales).all():
        raise matrix.error("has a scale that float16 doesn't hold; accepted: weights whose groups' scales it holds")


def _tensor_bytes(shard: Path) -> dict[str, int]:
    """Bytes of each tensor of a file that was written here, by its header."""
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - begin for name, (begin, end) in spans.items()}


def _refuse_unless_ours(out: Path) -> None:
    """Checks that `out` is free, an empty folder, or a quantized folder with nothing else in it.

    Raises:
        BuildError: replacing it would destroy something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file; give a folder for the quantized checkpoint")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if SEAL_NAME not in names:
        raise BuildError(f"{out} isn't empty and isn't a folder that was quantized here (no {SEAL_NAME}); {_ADVICE}")
    seal = _read_seal(out)
    if seal is None:
        raise BuildError(f"{out / SEAL_NAME} is damaged; {_ADVICE}")
    files = {name: (size, sha256) for name, (size, sha256) in seal["files"].items()}
    refuse_unless_as_written(out, files, SEAL_NAME, SEAL_NAME, _ADVICE)


def _request_of(out: Path) -> object:
    """What a finished folder was made by; None: it isn't one."""
    seal = _read_seal(out)
    return None if seal is None else seal["request"]


def _read_seal(out: Path) -> dict[str, Any] | None:
    """What a finished folder says of itself; None: nothing that was written here."""
    try:
        seal = json.loads((out / SEAL_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(seal, dict) or seal.keys() != {"request", "files"} or not isinstance(seal["files"], dict):
        return None
    for entry in seal["files"].values():
        if not (isinstance(entry, list) and [type(each) for each in entry] == [int, str]):
            return None
    return seal


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
