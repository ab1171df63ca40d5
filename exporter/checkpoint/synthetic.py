"""A checkpoint of random values made on the fly: for sizing and benchmarks, without a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import WeightClass, checkpoint_tensors
from qwen_aot.exporter.model.vision_tensors import vision_tensors

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_POOL = 1_048_573  # values; a prime, so that no row length repeats in step with it
_WEIGHT_STD, _BIAS_STD, _NORM_STD = 0.02, 0.1, 0.1  # weights as transformers initializes them; norms around 1


class RandomCheckpoint:
    """Random bf16 weights for a config, without storage (see `exporter.checkpoint.base.Checkpoint`).

    A tensor is a window that slides over one pool of normal values, from a start that its name and the seed
    decide: the same name and seed give the same values, whichever rows are read, at the speed of a copy.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, name: str = "random") -> None:
        self.path = Path(name)
        self.name = name
        self.config = config
        self.tokenizer = TokenizerFiles()
        tensors = [*checkpoint_tensors(config), *(() if config.vision is None else vision_tensors(config.vision))]
        self.tensors: Mapping[str, TensorInfo] = {
            tensor.name: TensorInfo(tensor.name, tensor.shape, _BFLOAT16) for tensor in tensors
        }
        self._classes = {tensor.name: tensor.role.weight_class for tensor in tensors}
        self._seed = seed
        values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
        self._weights = (values * _WEIGHT_STD).astype(_BFLOAT16)
        self._pools = {
            WeightClass.BIAS: (values * _BIAS_STD).astype(_BFLOAT16),
            WeightClass.NORM: (1 + values * _NORM_STD).astype(_BFLOAT16),
        }

    @property
    def source(self) -> Mapping[str, str]:
        """Format, name and a digest of the seed: there is no header."""
        digest = hashlib.sha256(f"{self.name}:{self._seed}".encode()).hexdigest()
        return {"format": "random", "path": self.name, "sha256": digest}

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """One tensor, or some rows of it, made anew.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"a random {self.name} has no tensor {name!r}")
        shape = self.tensors[name].shape
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise CheckpointError(f"rows of {name!r} have step {step}; accepted: 1")
        count = max(0, stop - start)
        width = int(np.prod(shape[1:], dtype=np.int64))
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        first = (int.from_bytes(digest, "little") + start * width) % _POOL
        return _window(self._pool(name), first, count * width).reshape(count, *shape[1:])

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        """Refuses: every tensor here is plain numbers.

        Raises:
            CheckpointError: always.
        """
        raise no_codes(self.path, name)

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> RandomCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _pool(self, name: str) -> NDArray[Any]:
        weight_class = self._classes[name]
        if weight_class is WeightClass.NORM and not name.endswith(".weight"):  # a table of positions, a norm's bias
            return self._weights
        return self._pools.get(weight_class, self._weights)


def _window(pool: NDArray[Any], first: int, length: int) -> NDArray[Any]:
    """`length` values of the endlessly repeated pool, from `first`."""
    result = np.empty(length, pool.dtype)
    done = 0
    while done < length:
        part = min(len(pool) - first, length - done)
        result[done : done + part] = pool[first : first + part]
        done, first = done + part, 0
    return result
