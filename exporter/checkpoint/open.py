"""Opens a checkpoint with the reader of its format."""

from __future__ import annotations

import re
from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.adapters import refuse_adapter
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.commands import resave_command
from qwen_aot.exporter.checkpoint.downloads import is_unfinished, why_missing
from qwen_aot.exporter.checkpoint.hf.folder import HfFolderCheckpoint
from qwen_aot.exporter.checkpoint.model_name import located
from qwen_aot.exporter.checkpoint.part_names import part_paths

__all__ = ["open_checkpoint"]

_ACCEPTED = "accepted: a folder saved by transformers (config.json and .safetensors files), or a .gguf file"
_LISTED = 8  # file names in a message; the rest are counted
_PIECE = re.compile(r"(?P<name>.+\.gguf)[-.](split|part)[-_.]?[0-9a-z]+", re.IGNORECASE)  # bytes cut anywhere


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a checkpoint for reading: a Hugging Face folder with safetensors, or a `.gguf` file.

    Of a split GGUF model, any part stands for all. Nothing but headers and small files is read yet.

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
    if is_unfinished(path.name):
        raise CheckpointError(f"{path} is an unfinished download; run the same download again to finish it")
    piece = _PIECE.fullmatch(path.name)
    if piece is not None:
        whole = located(path).with_name(piece["name"])
        raise CheckpointError(f"{path} is a piece of {piece['name']}; join the pieces in order (`cat`) into {whole}")
    if path.name == "config.json" or path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{path} is one file of a checkpoint; give its folder: {path.parent}")
    raise CheckpointError(f"{path} is not a checkpoint; {_ACCEPTED}")


def _open_folder(folder: Path) -> Checkpoint:
    refuse_adapter(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    has_config = "config.json" in names
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if has_config and has_safetensors:
        return HfFolderCheckpoint(folder)
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
    if pickles and not has_safetensors:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when loaded; accepted: safetensors. Convert it "
            f"where you trust it: {resave_command('transformers.AutoModelForCausalLM', located(folder))} (then copy "
            "the tokenizer's files)"
        )
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        first_parts = [name for name in ggufs if (part_paths(Path(name)) or [Path(name)])[0].name == name]
        raise CheckpointError(f"{folder} holds GGUF files; give one of them: {', '.join(first_parts or ggufs)}")
    listed = ", ".join(names[:_LISTED]) or "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    lacks = " and ".join(
        what for what, there in (("config.json", has_config), (".safetensors files", has_safetensors)) if not there
    )
    download = "" if has_safetensors else why_missing(folder, "model.safetensors")
    raise CheckpointError(f"{folder} has no {lacks}; found: {listed}{more}{download}; {_ACCEPTED}")
