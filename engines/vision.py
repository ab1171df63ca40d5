"""The second engine of a bundle: the vision tower of a model that takes images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer

from qwen_aot.engines.builders import Builder, EngineFacts
from qwen_aot.engines.bundle.io_table import io_tensor
from qwen_aot.engines.spec.build_spec import IMAGES_OF_RUN, BuildSpec
from qwen_aot.engines.spec.precisions import plain_name
from qwen_aot.engines.spec.targets import TARGETS
from qwen_aot.errors import BuildError, CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.hf.tiktoken_file import IMAGE_TOKENS
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.manifest import VisionEngine, WeightEncodings


@dataclass(frozen=True, slots=True)
class Vision:
    """The tower as it will be written.

    Attributes:
        lowered: the graph.
        file: of the engine, in the bundle.
        precision: of its weights, which is the target's own: the tower is not quantized.
    """

    lowered: Traced
    file: str
    precision: str

    def entry(self, hashes: Mapping[str, str], facts: EngineFacts | None) -> VisionEngine:
        """What the manifest says of it.

        Args:
            hashes: of its weights.
            facts: what the compiled engine says about itself; None: the graph is the engine.
        """
        graph = self.lowered.model.graph
        return VisionEngine(
            file=self.file,
            precision=self.precision,
            quantization={},
            weight_encodings=WeightEncodings({}, {}),
            weight_hashes=hashes,
            inputs=tuple(map(io_tensor, graph.inputs)) if facts is None else facts.inputs,
            outputs=tuple(map(io_tensor, graph.outputs)) if facts is None else facts.outputs,
            tensorrt=None if facts is None else facts.tensorrt,
            plan=None if facts is None else facts.plan,
            max_batch=IMAGES_OF_RUN,
        )


def require_vision(spec: BuildSpec) -> str:
    """The file of the target's second engine.

    Raises:
        BuildError: the target has none.
    """
    file = spec.facts.vision_file
    if file is None:
        having = ", ".join(target for target, facts in TARGETS.items() if facts.vision_file is not None)
        raise BuildError(f"target {spec.target} builds no model that takes images; accepted: {having}")
    return file


def image_token_warnings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Looks for the tokens that images stand among in the checkpoint's tokenizer.

    Returns:
        A warning where it has no tokenizer: the bundle will take no images then.

    Raises:
        CheckpointError: its tokenizer has them at other ids than config.json says, or not at all.
    """
    vision, text = checkpoint.config.vision, checkpoint.tokenizer.files.get("tokenizer.json")
    assert vision is not None
    if text is None:
        return ("the checkpoint has no tokenizer, so that the bundle takes token ids only, and no images",)
    tokenizer = Tokenizer.from_str(text)
    found = [tokenizer.token_to_id(name) for name in IMAGE_TOKENS]
    expected = [vision.image_start_id + place for place in range(len(IMAGE_TOKENS))]
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {', '.join(IMAGE_TOKENS)} at {found}, and config.json at {expected} "
            "(visual.image_start_id); correct one of both"
        )
    return ()


def lower_vision(traced: Traced, builder: Builder, spec: BuildSpec) -> Vision:
    """Lowers a traced tower for the target.

    Raises:
        BuildError: the target builds none.
    """
    file = require_vision(spec)
    return Vision(builder.lower_vision(traced, spec), file, plain_name(spec.combination.compute_type))
