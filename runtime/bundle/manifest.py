"""The bundle format: what manifest.json says, and its strict JSON form (standard library only).

The parts have modules of their own, whose public names stand here too: `engine_entry`, `step_plan`, `tensorrt_facts`,
`files`; `version_1` reads the older format. `runtime.bundle.load` checks the files that a manifest lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle import version_1
from qwen_aot.runtime.bundle.checks import MAX_COUNT, require_counts, require_within
from qwen_aot.runtime.bundle.engine_entry import (
    CACHE_PREFIX,
    DTYPES,
    LAST_LOGITS,
    LOGITS_POSITIONS,
    ROTARY_OFFSET,
    VERIFY,
    VISION_STEP,
    EngineEntry,
    Engines,
    IoTensor,
    KernelGraph,
    Profile,
    TextEngine,
    VisionEngine,
    WeightEncodings,
    rotary_table,
)
from qwen_aot.runtime.bundle.files import MANIFEST_NAME, FileEntry, check_file_name
from qwen_aot.runtime.bundle.step_plan import MatrixProduct, PlanTensor, StepPlan
from qwen_aot.runtime.bundle.strict_json import parse_dataclass, parse_object
from qwen_aot.runtime.bundle.tensorrt_facts import PluginFacts, TensorRtFacts

__all__ = [
    "CACHE_PREFIX",
    "CAPACITY_STEP",
    "DTYPES",
    "FORMAT_VERSION",
    "LAST_LOGITS",
    "LOGITS_POSITIONS",
    "MANIFEST_NAME",
    "MAX_COUNT",
    "ROTARY_OFFSET",
    "VERIFY",
    "VISION_STEP",
    "EngineEntry",
    "Engines",
    "FileEntry",
    "IoTensor",
    "KernelGraph",
    "Manifest",
    "MatrixProduct",
    "ModelFacts",
    "PlanTensor",
    "PluginFacts",
    "Profile",
    "StepPlan",
    "TensorRtFacts",
    "TextEngine",
    "TextFiles",
    "VisionEngine",
    "WeightEncodings",
    "cache_capacity",
    "rotary_table",
]

FORMAT_VERSION = 2  # what is written; version 1 is read too
CAPACITY_STEP = 256  # tokens; a cache that grows has a multiple of this


def cache_capacity(max_context: int, prefill_chunk: int) -> int:
    """The most slots a row's cache may have, and the rows of the graph's rotary tables.

    Room for a full context and the padding of a prefill step, rounded up. GroupQueryAttention refuses a cache
    longer than its rotary tables, so the exporter and the runtime must agree on it.
    """
    return -(-(max_context + prefill_chunk) // CAPACITY_STEP) * CAPACITY_STEP


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the runtime and `inspect` need to know about the model."""

    name: str  # variant name, or the checkpoint's base name
    model_type: str
    num_parameters: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    source: Mapping[str, str]  # Checkpoint.source

    def __post_init__(self) -> None:
        require_counts(self, "num_parameters", most=2**63 - 1)
        require_counts(
            self,
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        ids = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        ids |= {f"eos_token_ids[{index}]": token_id for index, token_id in enumerate(self.eos_token_ids)}
        require_within(ids, 0, self.vocab_size - 1)


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The files that turn text into token ids and back; each is one of the bundle's, or None.

    Attributes:
        tokenizer: Hugging Face's tokenizer.json; None: the bundle takes and gives token ids only.
        compiled_tokenizer: the same as a table, for readers without a JSON vocabulary and regular expressions.
        compiled_chat_template: the chat template as literals, for readers without Jinja.
    """

    tokenizer: str | None
    compiled_tokenizer: str | None
    compiled_chat_template: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader of a bundle needs; nothing is re-derived from the graph.

    Attributes:
        engines: by what they do.
        max_context: tokens of a sequence, prompt included.
        max_batch: rows, which is how many sequences run at once.
        prefill_chunk: tokens of a prefill step, at most.
        default_max_new_tokens: for a request that doesn't say; None: the checkpoint doesn't either.
        tool_versions: of what built the bundle.
        files: all but the manifest, by name.
    """

    format_version: int
    model: ModelFacts
    target: str
    engines: Engines
    max_context: int
    max_batch: int
    prefill_chunk: int
    text: TextFiles
    default_max_new_tokens: int | None
    tool_versions: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise BundleError(f"format_version is {self.format_version!r}; accepted: {FORMAT_VERSION}")
        require_counts(self, "max_context", "max_batch", "prefill_chunk", "default_max_new_tokens")
        text = self.engines.text
        text.check_cache(self.max_context + self.prefill_chunk)
        text.check_logits(self.model.vocab_size, self.prefill_chunk)
        text.check_layers(self.model.num_hidden_layers)
        text.check_rotary()
        self._check_files()

    @property
    def max_capacity(self) -> int:
        """See `cache_capacity`."""
        return cache_capacity(self.max_context, self.prefill_chunk)

    def to_json(self) -> str:
        """The text of manifest.json."""
        document = asdict(self)
        text = document["engines"]["text"]
        if text["kernels"] is None:
            del text["kernels"]  # readers that are older than the key take what has none
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks manifest.json; one of format version 1 becomes what it says in version 2.

        Raises:
            BundleError: not JSON, a duplicate, unknown or missing key, a value of the wrong type or out of
                range, a file name that leaves the bundle, or another format version.
        """
        document = parse_object(text, MANIFEST_NAME)
        # Before anything else: another version may have other keys.
        version = document.get("format_version")
        if type(version) is not int or version not in (1, FORMAT_VERSION):
            raise BundleError(
                f"{MANIFEST_NAME} has format_version {version!r}, this runtime reads 1 and {FORMAT_VERSION}: rebuild "
                "the bundle with this version of qwen-aot, or run it with the one that built it"
            )
        return parse_dataclass(cls, version_1.upgraded(document) if version == 1 else document, MANIFEST_NAME)

    def _check_files(self) -> None:
        """Names stay inside the bundle, and whatever is named elsewhere in the manifest is among them."""
        for name in self.files:
            check_file_name(name)
        listed = ", ".join(self.files)
        named = [("engine file", engine.file) for engine in self.engines.all]
        if (kernels := self.engines.text.kernels) is not None:
            named.append(("graph for own kernels", kernels.file))
            if self.target != "cpu":
                raise BundleError(
                    f"the bundle's target is {self.target!r}, and its text engine has kernels, a graph for own CPU "
                    "kernels; accepted: with target 'cpu' alone"
                )
        named += [(key.replace("_", " "), name) for key, name in asdict(self.text).items() if name is not None]
        for what, name in named:
            if name not in self.files:
                raise BundleError(f"the {what} {name!r} is not among the bundle's files ({listed})")
        for engine in self.engines.all:
            plugins = None if engine.tensorrt is None else engine.tensorrt.plugins
            if plugins is not None and (
                plugins.file not in self.files or self.files[plugins.file].sha256 != plugins.sha256
            ):
                raise BundleError(
                    f"the plugin library {plugins.file!r} with SHA-256 {plugins.sha256!r} is not among the bundle's "
                    f"files ({listed})"
                )
