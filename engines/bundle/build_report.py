"""What was built and what it took: report.json of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_aot.engines.bundle.resources import Estimate
from qwen_aot.engines.bundle.stages import StageCost
from qwen_aot.runtime.bundle.manifest import Manifest

REPORT_NAME = "report.json"


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built and what it took."""

    out: Path
    manifest: Manifest  # without report.json, which holds this
    estimate: Estimate
    stages: tuple[StageCost, ...]
    warnings: tuple[str, ...] = ()
    verification: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(cost.seconds for cost in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        """Resident memory of the building process, the highest of all stages."""
        return max(cost.peak_memory_bytes for cost in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The content of report.json, as plain JSON values."""
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "stages": [asdict(cost) for cost in self.stages],
            "estimate": asdict(self.estimate),
            "warnings": list(self.warnings),
            "verification": dict(self.verification),
        }
