"""The published Qwen1.5 models (model types `qwen2`, `qwen2_moe`). A chat model has all facts of its base model."""

from __future__ import annotations

from qwen_aot.exporter.model.published.generation import Generation, decoder, experts

_MOE_A2_7B = experts(60, 4, 1408, 24, shared_size=5632)

QWEN1_5 = Generation(
    name="Qwen1.5",
    prefix="qwen1.5-",
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    sizes={
        "0.5b": decoder(1024, 2816, 24, 16, 16, 151936, tie_word_embeddings=True),
        "1.8b": decoder(2048, 5504, 24, 16, 16, 151936),
        "4b": decoder(2560, 6912, 40, 20, 20, 151936, rope_theta=5e6),
        "7b": decoder(4096, 11008, 32, 32, 32, 151936),
        "14b": decoder(5120, 13696, 40, 40, 40, 152064),
        "32b": decoder(5120, 27392, 64, 40, 8, 152064),
        "72b": decoder(8192, 24576, 80, 64, 64, 152064),
        "110b": decoder(8192, 49152, 80, 64, 8, 152064),
        "moe-a2.7b": decoder(2048, 5632, 24, 16, 16, 151936, model_type="qwen2_moe", moe=_MOE_A2_7B),
    },
    endings={"": {}, "-chat": {}},
)
