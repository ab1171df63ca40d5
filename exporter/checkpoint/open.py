"""Opens a checkpoint with the reader of its format."""

from __future__ import annotations

from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.hf.folder import HfFolderCheckpoint

__all__ = ["open_checkpoint"]

_ACCEPTED = "accepted: a folder saved by transformers (config.json and .safetensors files), or a .gguf file"
_LISTED = 8  # file names in a message; the rest are counted


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a checkpoint for reading: a Hugging Face folder with safetensors, or a `.gguf` file.

    Nothing but headers and small files is read yet.

    Raises:
        CheckpointError: there is no checkpoint here, or it is damaged or not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {_ACCEPTED}")
    if path.suffix.lower() == ".gguf":
        from qwen_aot.exporter.checkpoint.gguf.reader import GgufCheckpoint  # the gguf package, only where it is needed

        return GgufCheckpoint(path)
    if path.name == "config.json" or path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a checkpoint; give its folder: {path.parent}")
    raise CheckpointError(f"{path} is not a checkpoint; {_ACCEPTED}")


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(entry.name for entry in folder.iterdir())
    has_config = "config.json" in names
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if has_config and has_safetensors:
        return HfFolderCheckpoint(folder)
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
    if pickles and not has_safetensors:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when loaded; accepted: safetensors. "
            f'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\" "
            "(then copy the tokenizer's files)"
        )
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        raise CheckpointError(f"{folder} holds GGUF files; give one of them: {', '.join(ggufs)}")
    listed = ", ".join(names[:_LISTED]) or "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    lacks = " and ".join(
        what for what, there in (("config.json", has_config), (".safetensors files", has_safetensors)) if not there
    )
    raise CheckpointError(f"{folder} has no {lacks}; found: {listed}{more}; {_ACCEPTED}")
