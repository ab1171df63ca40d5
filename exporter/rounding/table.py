"""Rounds the head, or the embedding that is one too, with the inputs in view that its rows multiply."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding.algorithms import Algorithm
from qwen_aot.exporter.rounding.compensated import compensation_for
from qwen_aot.exporter.rounding.grid import fit_grid
from qwen_aot.exporter.rounding.importance import importance_of
from qwen_aot.exporter.rounding.refusals import no_scale, require_numbers

_ROWS = 8192  # rounded together


def head_moment(checkpoint: Checkpoint, hidden: HiddenStates) -> Moment:
    """Of what the head reads: the streams behind the last layer, normalised.

    Raises:
        BuildError: they hold NaN or infinities.
    """
    config = checkpoint.config
    norm = torch.from_numpy(checkpoint.read(Role.FINAL_NORM.tensor_name()).astype(np.float32))
    moment = Moment.empty(config.hidden_size)
    for part in hidden.batches():
        x = hidden.read(config.num_hidden_layers, part).flatten(0, 1)
        moment.add(norm * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)))
    require_numbers(moment, "the head")
    return moment


def round_table(
    checkpoint: Checkpoint, name: str, form: CodeForm, algorithm: Algorithm, moment: Moment | None
) -> EncodedRows:
    """The codes of an embedding or a head [V, M], made some rows at a time.

    Args:
        checkpoint: that holds it.
        name: of the tensor.
        form: of the codes.
        algorithm: how.
        moment: of the inputs that its rows multiply; None: it isn't a head, or the algorithm needs none.

    Raises:
        BuildError: float16 doesn't hold a scale.
        CheckpointError: it can't be read.
    """
    rows, width = checkpoint.tensors[name].shape
    compensation = compensation_for(moment) if algorithm.compensates else None
    importance = importance_of(moment, width)
    parts: list[EncodedRows] = []
    for start in range(0, rows, _ROWS):
        matrix: Tensor = torch.from_numpy(
            checkpoint.read(name, slice(start, min(start + _ROWS, rows))).astype(np.float32)
        )
        grid = fit_grid(matrix, importance, form)
        if not grid.is_finite:
            raise no_scale(name)
        codes = grid.nearest(matrix) if compensation is None else compensation.codes(matrix, grid)
        parts.append(grid.encoded(codes))
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return EncodedRows(
        form,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )
