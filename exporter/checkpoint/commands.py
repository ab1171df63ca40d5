"""Commands that messages give: quoted, so that they can be pasted whatever the paths hold."""

from __future__ import annotations

import shlex
from pathlib import Path


def resave_command(loader: str, folder: Path, then: str = "", suffix: str = "-safetensors") -> str:
    """Loads a folder with a class of transformers or peft and saves what becomes of it beside it.

    Args:
        loader: `module.Class`, which has `from_pretrained`.
        folder: what is loaded.
        then: calls between loading and saving: `.merge_and_unload()`.
        suffix: of the folder that is written.
    """
    module, _, kind = loader.rpartition(".")
    target = folder.with_name(folder.name + suffix)
    code = (
        f"from {module} import {kind} as M; "
        f"M.from_pretrained({str(folder)!r}, dtype='auto'){then}.save_pretrained({str(target)!r})"
    )
    return f"python -c {shlex.quote(code)}"
