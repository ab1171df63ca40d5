"""A trained Qwen2 model with its biases, of up to 211 on keys: what rounding does to activations as Qwen has them.

Numbers seen are of 256 tokens of this project's license.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, PreTrainedTokenizerFast

from qwen_aot.engines.verify.reference_model import load_model
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.text.chat_template import ChatTemplate
from tests.real_model import ROOT, qwen_aot
from tests.shared import once
from tests.trained_qwen2 import SIZE, trained_qwen2

pytestmark = [pytest.mark.network, pytest.mark.slow]

FP16_MAX = 65504.0
Rounding = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def file(pytestconfig: pytest.Config) -> Path:
    return trained_qwen2(Path(pytestconfig.cache.mkdir("trained_qwen2")))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    with open_checkpoint(file) as checkpoint:
        return Tokenizer.from_str(checkpoint.tokenizer.files["tokenizer.json"])


@pytest.fixture(scope="module")
def model(file: Path) -> Any:
    """Of transformers, its weights read by the gguf package."""
    with open_checkpoint(file) as checkpoint:
        return load_model(checkpoint)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> torch.Tensor:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids[:256]])


@pytest.fixture(scope="module")
def exact(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return log_probabilities(model, ids)


def log_probabilities(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **options).logits[0].double()
    return logits.log_softmax(-1)


def divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    """KL divergence in nats, the mean over positions."""
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_it_has_what_made_models_lack(file: Path, model: Any) -> None:
    assert file.stat().st_size == SIZE
    with open_checkpoint(file) as checkpoint:
        config = checkpoint.config
        encodings = {info.encoding.name for info in checkpoint.tensors.values() if info.encoding is not None}
    assert (config.model_type, config.attention_bias, config.max_position_embeddings) == ("qwen2", True, 32768)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (14, 2, 64)
    assert len(encodings) == 4  # Q4_K, Q5_0, Q6_K and Q8_0
    assert max(float(layer.self_attn.k_proj.bias.abs().max()) for layer in model.model.layers) > 200


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. 请简短。"},
    {"role": "user", "content": "How warm is it in Paris & Rome?"},
    {
        "role": "assistant",
        "content": "I'll look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": 1}}}
            for city in ("Paris", "Rome <Lazio>")
        ],
    },
    {"role": "tool", "content": '{"celsius": 21.5}'},
    {"role": "tool", "content": '{"celsius": 27}'},
    {"role": "assistant", "content": "21.5 and 27."},
    {"role": "user", "content": "And in Größe?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The temperature in °C, "now".',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tools", "no tools"])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION[:5]], ids=["all", "one", "results"])
def test_its_whole_template_renders_as_transformers_renders_it(
    messages: list[dict[str, Any]], tools: Any, file: Path
) -> None:
    with open_checkpoint(file) as checkpoint:
        files = checkpoint.tokenizer.files
    config = json.loads(files["tokenizer_config.json"])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(files["tokenizer.json"]), chat_template=config["chat_template"]
    )
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(config["chat_template"]).render(messages, tools=tools) == expected
    assert ("<tools>" in expected) == (tools is not None)


@contextmanager
def rounded(model: Any, through: Rounding, seen: dict[str, float]) -> Iterator[None]:
    """Every linear's weights, input and result rounded; `seen`: the largest magnitude of each before that."""
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if "_proj" in name}
    handles = []

    def watch(name: str, x: torch.Tensor) -> torch.Tensor:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))
        return through(x)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            for parameter in module.parameters():
                parameter.copy_(through(parameter))
            handles += [
                module.register_forward_pre_hook(lambda _, x, name=name: (watch(f"{name} reads", x[0]),)),
                module.register_forward_hook(lambda _, __, y, name=name: watch(f"{name} gives", y)),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)


def test_fp16_holds_its_activations(model: Any, ids: torch.Tensor, exact: torch.Tensor) -> None:
    """Between fp32 norms and the fp32 residual stream. Seen: KL 9e-6, magnitudes up to 527; bf16, KL 6e-4 or so."""
    seen: dict[str, float] = {}
    with rounded(model, lambda x: x.half().float(), seen):
        assert divergence(exact, log_probabilities(model, ids)) < 5e-5
    assert max(seen.values()) < FP16_MAX / 10
    with rounded(model, lambda x: x.bfloat16().float(), {}):
        assert divergence(exact, log_probabilities(model, ids)) > 1e-4  # what 8 bits lose shows


class RoundedCache(DynamicCache):
    """Keys and values as codes of -127 to 127 times a scale, the largest magnitude along an axis / 127, in fp16."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self._axis = axis

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        """Rounds what is new [B, Hkv, T, D]."""
        return super().update(self._through_int8(keys), self._through_int8(values), *args, **kwargs)

    def _through_int8(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(self._axis, keepdim=True) / 127).half().float()
        return (x / scale).round().clamp(-127, 127) * scale


TOKENS, CHANNELS = 2, 3


def test_biases_of_keys_want_scales_of_channels(model: Any, ids: torch.Tensor, exact: torch.Tensor) -> None:
    """A few channels of keys hold 200 in all tokens, and the others about 1: docs/quantization.md.

    With a scale a channel, as on the CPU, KL 0.0008. With one a token, as QwenGQA has, these few take all codes:
    KL 0.032.
    """
    by_channel, by_token = (
        divergence(exact, log_probabilities(model, ids, cache=RoundedCache(axis), use_cache=True))
        for axis in (TOKENS, CHANNELS)
    )
    assert by_channel < 0.002
    assert 0.01 < by_token < 0.1


@pytest.fixture(scope="module")
def bundle(file: Path, shared_folder: Path) -> Callable[..., Path]:
    """Built as users do, once a session for each set of options."""

    def build(*options: str) -> Path:
        def make(folder: Path) -> Path:
            result = qwen_aot("build", file, "-o", folder / "bundle", "--max-context", 2048, *options)
            assert result.returncode == 0, result.stderr
            return folder / "bundle"

        return once(shared_folder / "trained_qwen2" / "-".join(options), make)

    return build


INT8, INT8_CACHE = ("--precision", "int8"), ("--precision", "int8", "--kv-precision", "int8")


@pytest.mark.parametrize("options", [INT8, INT8_CACHE, ("--precision", "int4")], ids=["int8", "int8 cache", "int4"])
def test_verify_passes_with_the_stated_bounds(
    options: tuple[str, ...], bundle: Callable[..., Path], file: Path
) -> None:
    """Every weight by its bytes, and answers. Seen: KL 0.0006, 0.0018, and 0.10."""
    result = qwen_aot("verify", bundle(*options), "--reference", file, "--windows", 3, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["weights"]["compared"] == "bytes"


@pytest.mark.parametrize("options", [INT8, INT8_CACHE], ids=["int8", "int8 cache"])
def test_it_knows_what_it_learned(options: tuple[str, ...], bundle: Callable[..., Path]) -> None:
    asked = ("--prompt", "The capital of France is", "--max-new-tokens", 4, "--temperature", 0)
    result = qwen_aot("generate", bundle(*options), *asked)
    assert result.returncode == 0 and result.stdout.strip().startswith("Paris"), result.stdout + result.stderr


def test_its_text_is_compiled_for_c(bundle: Callable[..., Path]) -> None:
    assert {"tokenizer.qtok", "chat.qtpl"} <= {path.name for path in bundle(*INT8).iterdir()}
