"""Checkpoint readers: one file a format, one interface (`exporter.checkpoint.base`)."""

from __future__ import annotations

from pathlib import Path

from exporter.checkpoint.base import Checkpoint, FileSpan, TensorInfo, TokenizerFiles
from exporter.checkpoint.hf_folder import HfFolderCheckpoint

__all__ = ["Checkpoint", "FileSpan", "TensorInfo", "TokenizerFiles", "open_checkpoint"]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a Hugging Face folder (safetensors). Nothing is loaded yet."""
    return HfFolderCheckpoint(Path(path))
