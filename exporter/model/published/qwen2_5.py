"""The published Qwen2.5 models and QwQ (model type `qwen2`). Coder and Math have the shapes of their size."""

from __future__ import annotations

from qwen_aot.exporter.model.published.generation import Generation, decoder

_LONG = 131072  # of the larger base models: what an instruct model has with YaRN by 4

QWEN2_5 = Generation(
    name="Qwen2.5",
    prefix="qwen2.5-",
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    sizes={
        "0.5b": decoder(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
        "1.5b": decoder(1536, 8960, 28, 12, 2, 151936, max_position_embeddings=_LONG, tie_word_embeddings=True),
        "3b": decoder(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
        "7b": decoder(3584, 18944, 28, 28, 4, 152064, max_position_embeddings=_LONG),
        "14b": decoder(5120, 13824, 48, 40, 8, 152064, max_position_embeddings=_LONG, rms_norm_eps=1e-5),
        "32b": decoder(5120, 27648, 64, 40, 8, 152064, max_position_embeddings=_LONG, rms_norm_eps=1e-5),
        "72b": decoder(8192, 29568, 80, 64, 8, 152064, max_position_embeddings=_LONG, rms_norm_eps=1e-5),
    },
    endings={"": {}, "-instruct": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}},
)

QWQ = Generation(
    name="QwQ",
    prefix="qwq-",
    sizes={"32b": decoder(5120, 27648, 64, 40, 8, 152064, max_position_embeddings=40960, rms_norm_eps=1e-5)},
    endings={"": {}, "-preview": {"max_position_embeddings": 32768}},
)
