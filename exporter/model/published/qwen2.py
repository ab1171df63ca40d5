"""The published Qwen2 models (model types `qwen2`, `qwen2_moe`)."""

from __future__ import annotations

from qwen_aot.exporter.model.published.generation import Generation, decoder, experts

_LONG = 131072  # of the base models: what an instruct model has with YaRN by 4
_MOE_57B = experts(64, 8, 2560, 28, shared_size=20480)

QWEN2 = Generation(
    name="Qwen2",
    prefix="qwen2-",
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    sizes={
        "0.5b": decoder(896, 4864, 24, 14, 2, 151936, max_position_embeddings=_LONG, tie_word_embeddings=True),
        "1.5b": decoder(1536, 8960, 28, 12, 2, 151936, max_position_embeddings=_LONG, tie_word_embeddings=True),
        "7b": decoder(3584, 18944, 28, 28, 4, 152064, max_position_embeddings=_LONG),
        "72b": decoder(8192, 29568, 80, 64, 8, 152064, max_position_embeddings=_LONG, rms_norm_eps=1e-5),
        "57b-a14b": decoder(
            3584, 18944, 28, 28, 4, 151936, model_type="qwen2_moe", max_position_embeddings=_LONG, moe=_MOE_57B
        ),
    },
    endings={"": {}, "-instruct": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}},
)
