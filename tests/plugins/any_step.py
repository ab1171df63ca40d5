"""A step of any plugin."""

from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

Step = GqaStep | MoeStep | LinearStep
