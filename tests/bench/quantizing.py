"""What quantizing a published shape takes: some layers of it, random weights, and the whole model's time worked out.

    python -m tests.bench.quantizing qwen1.5-0.5b --layers 24 --algorithm awq
    python -m tests.bench.quantizing qwen1.5-72b --layers 2

Prints JSON: seconds of each stage, seconds a layer, peak resident memory, and hours for all layers of the model, which
is seconds a layer times their number (embedding and head are copied). Memory doesn't grow with layers, of which one is
there at a time. The peak is the process's: give each measurement one of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from qwen_aot.engines.quantize import quantize_checkpoint
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.variants import VARIANTS


def measured(variant: str, layers: int, spec: QuantizeSpec, threads: int | None = None) -> dict[str, Any]:
    """Quantizes the first layers of a variant into a folder that is deleted.

    Args:
        variant: a name of `VARIANTS`.
        layers: how many of its layers.
        spec: how.
        threads: see `quantize_checkpoint`.
    """
    whole = VARIANTS[variant]
    cut = dataclasses.replace(whole, num_hidden_layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        report = quantize_checkpoint(RandomCheckpoint(cut), spec, Path(folder) / "out", threads=threads)
    seconds = {cost.stage: cost.seconds for cost in report.stages}
    a_layer = (seconds["round"] + seconds.get("measure", 0.0)) / layers
    return {
        "variant": variant,
        "algorithm": spec.algorithm,
        "layers": layers,
        "tokens": report.tokens,
        "seconds": seconds,
        "seconds_a_layer": a_layer,
        "hours_for_all_layers": a_layer * whole.num_hidden_layers / 3600,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--algorithm", default=QuantizeSpec().algorithm)
    parser.add_argument("--tokens", type=int, default=QuantizeSpec().tokens)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    spec = QuantizeSpec(algorithm=given.algorithm, tokens=given.tokens)
    print(json.dumps(measured(given.variant, given.layers, spec, given.threads), indent=2))


if __name__ == "__main__":
    main()
