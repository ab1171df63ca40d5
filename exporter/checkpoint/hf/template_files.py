"""The chat template of a Hugging Face folder, from whichever of its files transformers takes it.

Source: transformers' `PreTrainedTokenizerBase._from_pretrained`: files of their own stand above tokenizer_config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qwen_aot.exporter.checkpoint.hf.config import read_json
from qwen_aot.exporter.checkpoint.text_files import read_text

logger = logging.getLogger(__name__)

CHAT_TEMPLATE_NAME = "chat_template.jinja"  # where transformers 5 saves the template
ADDITIONAL_FOLDER = "additional_chat_templates"  # its named ones: NAME.jinja
PROCESSOR_NAME = "chat_template.json"  # of a processor's, which a tokenizer alone doesn't read


def read_templates(folder: Path, in_config: object) -> Any:
    """A text, or several as [{"name": ..., "template": ...}]; None: there is none.

    Args:
        folder: of the checkpoint.
        in_config: `chat_template` of tokenizer_config.json.

    Raises:
        CheckpointError: a file can't be read.
    """
    templates = {}
    if (folder / CHAT_TEMPLATE_NAME).is_file():
        templates["default"] = read_text(folder / CHAT_TEMPLATE_NAME)
    if (folder / ADDITIONAL_FOLDER).is_dir():
        for path in sorted((folder / ADDITIONAL_FOLDER).glob("*.jinja")):
            templates[path.stem] = read_text(path)
    if templates:
        if in_config is not None and templates.keys() != {"default"}:
            logger.info("%s: the templates are those of their own files, not tokenizer_config.json's", folder)
        if templates.keys() == {"default"}:
            return templates["default"]
        return [{"name": name, "template": template} for name, template in templates.items()]
    if in_config is None and (folder / PROCESSOR_NAME).is_file():
        logger.info("%s: the chat template is that of %s: no other file has one", folder, PROCESSOR_NAME)
        return read_json(folder / PROCESSOR_NAME).get("chat_template")
    return in_config
