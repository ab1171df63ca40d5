"""What `verify` says of a bundle: its weights, then its scores, and one verdict of both."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qwen_aot.engines.verify.scores import Scores, Verification
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.errors import BuildError


@dataclass(frozen=True, slots=True)
class BundleReport:
    """Both comparisons.

    Attributes:
        weights: of the weights with those that the checkpoint makes.
        scores: of the bundle's answers with the reference's; None: it wasn't run, since its weights are others or
            this machine can't.
        reference_reader: who read the checkpoint for the reference; None: nobody did.
        not_run: why this machine can't run the engine; None: it can, or needn't.
        kernels: whose ran it, "own" or "onnxruntime"; None: they are compiled into the engine, or it wasn't run.
    """

    weights: WeightCheck
    scores: Verification | None
    reference_reader: str | None
    not_run: str | None = None
    kernels: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Of both: passed only where both passed."""
        return Verdict.of(verdict for verdict, _ in self._parts())

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it hasn't passed; of a failure, what failed."""
        if self.verdict is Verdict.PASSED:
            return ()
        return tuple(reason for verdict, reasons in self._parts() if verdict is self.verdict for reason in reasons)

    def _parts(self) -> list[tuple[Verdict, tuple[str, ...]]]:
        """The verdict of each comparison, with its reasons."""
        parts: list[tuple[Verdict, tuple[str, ...]]] = [(self.weights.verdict, (self.weights.reason,))]
        if self.scores is not None:
            parts.append((self.scores.verdict, self.scores.reasons))
        elif self.weights.verdict is not Verdict.FAILED:
            parts.append((Verdict.INCONCLUSIVE, (f"its answers weren't compared: {self.not_run}",)))
        return parts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what wasn't scored is null."""
        names = (*(field.name for field in fields(Scores)), "perplexity_ratio")
        scored = {**dict.fromkeys(names), "checks": []} if self.scores is None else self.scores.to_json()
        return {
            **scored,
            "verdict": self.verdict.value,
            "passed": self.verdict is Verdict.PASSED,
            "reasons": list(self.reasons),
            "weights": self.weights.to_json(),
            "reference_reader": self.reference_reader,
            "kernels": self.kernels,
        }


def require_not_failed(report: BundleReport) -> dict[str, Any]:
    """The report as JSON values.

    Raises:
        BuildError: names what failed, with value and bound.
    """
    if report.verdict is Verdict.FAILED:
        remedy = (
            "" if report.weights.verdict is Verdict.FAILED else "; choose a higher precision or a smaller block size"
        )
        raise BuildError(f"the bundle differs from the reference: {'; '.join(report.reasons)}{remedy}")
    return report.to_json()
