"""One verdict of two comparisons, and of one that couldn't be made."""

from __future__ import annotations

import itertools

import pytest

from qwen_aot.engines.verify.bundle_report import BundleReport, require_not_failed
from qwen_aot.engines.verify.scores import Check, Scores, Verification
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import WeightCheck
from qwen_aot.errors import BuildError


def weights(verdict: Verdict) -> WeightCheck:
    return WeightCheck(verdict, "bytes", 3, 12, (), "" if verdict is Verdict.PASSED else f"weights {verdict.value}")


def scores(verdict: Verdict) -> Verification:
    found = Scores(100, 0.0, 0.0, 0.5, 1.0, 100, 1.0, 1, 1.0, 1.0, 2.0, 2.0, 0.0)
    bound = 0.1 if verdict is Verdict.FAILED else 1.0
    doubts = ("few positions are decisive",) if verdict is Verdict.INCONCLUSIVE else ()
    return Verification(found, (Check("kl_divergence", 0.5, bound, is_upper=True),), doubts)


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(Verdict, Verdict)))
def test_both_comparisons(ours: Verdict, theirs: Verdict) -> None:
    report = BundleReport(weights(ours), scores(theirs), "transformers")
    assert scores(theirs).verdict is theirs
    expected = (
        Verdict.FAILED
        if Verdict.FAILED in (ours, theirs)
        else Verdict.PASSED
        if ours is theirs is Verdict.PASSED
        else Verdict.INCONCLUSIVE
    )
    assert report.verdict is expected
    assert bool(report.reasons) == (expected is not Verdict.PASSED)
    assert (f"weights {expected.value}" in report.reasons) == (ours is expected is not Verdict.PASSED)


def test_an_engine_that_cannot_run_here_leaves_good_weights_inconclusive() -> None:
    report = BundleReport(weights(Verdict.PASSED), None, None, not_run="there is no GPU")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.reasons == ("its answers weren't compared: there is no GPU",)
    assert require_not_failed(report)["verdict"] == "inconclusive"


def test_other_weights_have_failed_whether_or_not_the_engine_runs() -> None:
    for not_run in (None, "there is no GPU"):
        report = BundleReport(weights(Verdict.FAILED), None, None, not_run=not_run)
        assert (report.verdict, report.reasons) == (Verdict.FAILED, ("weights failed",))
        with pytest.raises(BuildError, match=r"differs from the reference: weights failed$"):
            require_not_failed(report)
