"""What a quantized folder's own numbers lose, computed by transformers in fp32 and no engine of ours.

    python -m tests.bench.folder_losses REFERENCE FOLDER... --tokens 2048

Weights are those that the codes stand for, and inputs are rounded where the folder says so, both by the second reader
(`engines.verify.quantized_model`): what is lost for every target that keeps the codes, one that can't be run here too.
Windows are those of `qwen-aot compare`: of the evaluation texts, at most 512 tokens each. Beside the losses: what share
of the layers' matrices is codes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qwen_aot.engines.spec.quantize_spec import rounded_tensors
from qwen_aot.engines.verify.comparison import cut
from qwen_aot.engines.verify.reference import Reference
from qwen_aot.exporter.calibration.texts import evaluation_texts
from qwen_aot.exporter.checkpoint.open import open_checkpoint

WINDOW = 512


def windows_of(folder: Path, tokens: int) -> tuple[NDArray[np.int64], ...]:
    """Pieces of the evaluation texts by a checkpoint's tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [(sample.kind, tokenizer.encode(sample.text).ids) for sample in evaluation_texts()]
    return cut(texts, WINDOW, tokens).token_ids


def log_probabilities(checkpoint: Path, windows: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
    """Of each window [T - 1, V], of what follows each token but the last."""
    with open_checkpoint(checkpoint) as opened:
        reference = Reference(opened)
        for window in windows:
            yield torch.log_softmax(torch.from_numpy(reference.logits(window, 0)[:-1]), -1)


def losses(
    expected: Sequence[torch.Tensor], found: Iterator[torch.Tensor], windows: Sequence[NDArray[np.int64]]
) -> tuple[float, float, float, float, float]:
    """KL in nats and its standard error, the ratio of perplexities and its, and how often the likeliest is the same."""
    divergences, differences, same = [], [], []
    for want, have, window in zip(expected, found, windows, strict=True):
        divergences.append((want.exp() * (want - have)).sum(-1))
        following = torch.from_numpy(window[1:])[:, None]
        differences.append((want.gather(1, following) - have.gather(1, following))[:, 0])
        same.append((want.argmax(-1) == have.argmax(-1)).float())
    kl, lost = torch.cat(divergences), torch.cat(differences)
    count = math.sqrt(len(kl))
    ratio = math.exp(float(lost.mean()))
    return (
        float(kl.mean()),
        float(kl.std()) / count,
        ratio,
        ratio * float(lost.std()) / count,
        float(torch.cat(same).mean()),
    )


def share_of_codes(folder: Path) -> float:
    """Of the weights inside the layers that could be codes."""
    with open_checkpoint(folder) as checkpoint:
        sizes = {tensor.name: math.prod(tensor.shape) for tensor in rounded_tensors(checkpoint.config)}
        coded = sum(size for name, size in sizes.items() if checkpoint.tensors[name].encoding is not None)
        return coded / sum(sizes.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args(arguments)
    windows = windows_of(options.folders[0], options.tokens)
    expected = list(log_probabilities(options.reference, windows))
    print("| folder | codes | KL, nats | perplexity ratio | top-1 |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    for folder in options.folders:
        kl, kl_error, ratio, ratio_error, same = losses(expected, log_probabilities(folder, windows), windows)
        share = f"{share_of_codes(folder):.1%}"
        print(
            f"| {folder.name} | {share} | {kl:.4f} ± {kl_error:.4f} | {ratio:.4f} ± {ratio_error:.4f} | {same:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
