"""What `verify`, `compare` and `bench` may have found, made up: for their screens."""

from __future__ import annotations

import dataclasses

from qwen_aot.engines.verify.bundle_report import BundleReport
from qwen_aot.engines.verify.comparison import Accuracy, Scored
from qwen_aot.engines.verify.scores import Check, Scores, Verification
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.runtime.cli import compare
from qwen_aot.runtime.cli.bench_load import BenchReport
from qwen_aot.runtime.cli.comparison_table import Row
from qwen_aot.runtime.measure.rounds import Spread
from qwen_aot.runtime.measure.summary import LoadReport, Percentiles

_SCORES = Scores(
    positions=640,
    max_logit_difference=1.25,
    mean_logit_difference=0.0512,
    kl_divergence=0.24,
    top1_agreement=0.86,
    decisive_positions=67,
    decisive_top1_agreement=0.925,
    greedy_tokens=64,
    greedy_agreement=0.719,
    greedy_prefix=0.03,
    perplexity=14.2,
    reference_perplexity=11.7,
    log_ratio_error=0.06,
)
_KL = Check("kl_divergence", 0.24, 0.35, is_upper=True)
_TOP1 = Check("top1_agreement", 0.925, 0.85, is_upper=False)
_GREEDY = Check("greedy_agreement", 0.719, 0.5, is_upper=False)
_RATIO = Check("perplexity_ratio", 1.215, 1.3, is_upper=True, uncertainty=0.12)
_SAME = WeightCheck(Verdict.PASSED, "bytes", 305, 115_343_360, (), "")
_OTHER = WeightCheck(
    Verdict.FAILED,
    "bytes",
    305,
    115_343_360,
    ("layers.3.mlp.down.weight_scale",),
    "1 of 305 tensors isn't what the checkpoint makes: layers.3.mlp.down.weight_scale",
)

REPORTS = {
    "passed": BundleReport(
        _SAME, Verification(_SCORES, (_KL, _TOP1, _GREEDY, _RATIO)), "the gguf package and transformers 5.24.0"
    ),
    "bound": BundleReport(
        _SAME,
        Verification(
            dataclasses.replace(_SCORES, greedy_agreement=0.25),
            (_KL, _TOP1, dataclasses.replace(_GREEDY, found=0.25), _RATIO),
        ),
        "transformers 5.24.0",
    ),
    "weights": BundleReport(_OTHER, None, None),
    "elsewhere": BundleReport(
        _SAME, None, None, not_run="TensorRT-RTX can't be imported (No module named 'tensorrt_rtx'): install 1.7.1"
    ),
}


def _scored(divergence: float, ratio: float, agreement: float) -> Scored:
    kinds = {"prose": 0.00497, "code": 0.005, "chinese": 0.00501}

    def accuracy(of: float) -> Accuracy:
        return Accuracy(
            positions=10_654,
            kl_divergence=of,
            kl_error=of / 60,
            perplexity=25.4 * ratio,
            perplexity_error=0.83,
            perplexity_ratio=ratio,
            ratio_error=0.004,
            top1_agreement=agreement,
            greedy_tokens=768,
            greedy_agreement=agreement,
        )

    return Scored(accuracy(divergence), {kind: accuracy(divergence * of / 0.00498) for kind, of in kinds.items()})


_SPEED = Spread(62.13, 61.0, 63.0, (61.0, 62.13, 63.0))
_PARAMETERS = 134_515_008

COMPARISON = compare.Report(
    (
        Row("reference, fp32", None, {}, 4 * _PARAMETERS, _PARAMETERS, _scored(0.0, 1.0, 1.0)),
        Row("int8", "int8", {}, 154_000_000, _PARAMETERS, _scored(0.00498, 1.012, 0.946), _SPEED),
        Row("int4-block64-asymmetric", "int4", {}, 106_000_000, _PARAMETERS, _scored(0.236, 1.198, 0.75), _SPEED,
            no_layers="a graph has no norm"),
        Row("rtx", "rtx", {}, 106_000_000, _PARAMETERS,
            not_compared="TensorRT-RTX can't be imported (No module named 'tensorrt_rtx'): install 1.7.1"),
    ),
    has_failed=False,
    window=512,
    windows=24,
    reference_reader="the gguf package",
    model="SmolLM2-135M-Instruct.Q4_1.gguf",
)  # fmt: skip

_ANSWERED = LoadReport(
    concurrency=1,
    rate=None,
    requests=32,
    answered=32,
    failures={},
    messages={},
    short_answers=0,
    seconds=81.92,
    prompt_tokens=16384,
    completion_tokens=4096,
    completion_tokens_per_second=50.0,
    requests_per_second=0.390625,
    first_token_seconds=Percentiles(0.4567, 0.6789, 1.2345, 12.5),
    between_tokens_seconds=Percentiles(0.0212, 0.0234, 0.025, 0.0257),
    gap_seconds=Percentiles(0.0191, 0.03, 0.123, 4.5),
    end_to_end_seconds=Percentiles(2.5, 3.5, 4.25, 16.0),
    cpu_seconds=160.25,
    late_seconds=0.001,
)
LOADED = BenchReport(
    "tiny-model, cpu fp32: 512 prompt and 128 new tokens",
    {},
    (
        (_ANSWERED, {}),
        (dataclasses.replace(_ANSWERED, concurrency=16, answered=30, short_answers=1,
                             failures={"status 429": 1, "error in stream": 1},
                             messages={"status 429": "the queue is full; try again later",
                                       "error in stream": "the engine failed"}), {}),
        (dataclasses.replace(_ANSWERED, concurrency=None, rate=0.5, answered=0, failures={"connect": 32},
                             messages={"connect": "All connection attempts failed"}, completion_tokens_per_second=0.0,
                             requests_per_second=0.0, first_token_seconds=None, between_tokens_seconds=None,
                             gap_seconds=None, end_to_end_seconds=None), {}),
    ),
    ("load 4 min 05 s, peak memory 323 MB",),
)  # fmt: skip
