"""The published Qwen-VL (model type `qwen` with a vision tower), and its relatives whose weights aren't published."""

from __future__ import annotations

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.generation import Generation
from qwen_aot.exporter.model.vision import VisionConfig

_ENDOFTEXT = 151643
_SEQ_LENGTH = 2048  # tokens that it was trained with: log-n scaling and dynamic NTK begin behind them

QWEN_VL = Generation(
    name="Qwen-VL",
    prefix="qwen-",
    sizes={
        "vl": ModelConfig(
            model_type="qwen",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            logn_attn_length=_SEQ_LENGTH,
            dynamic_ntk_length=_SEQ_LENGTH,
            bos_token_id=None,
            eos_token_ids=(_ENDOFTEXT,),
            pad_token_id=_ENDOFTEXT,
            vision=VisionConfig(
                image_size=448,
                patch_size=14,
                width=1664,
                layers=48,
                heads=16,
                mlp_ratio=4.9231,
                output_dim=4096,
                image_start_id=151857,
            ),
        ),
    },
    endings={"": {}, "-chat": {}},
)

WITHOUT_OPEN_WEIGHTS = ("qwen-vl-plus", "qwen-vl-max")  # served by their makers alone
