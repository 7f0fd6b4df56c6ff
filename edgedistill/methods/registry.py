"""The methods by name: the settings that a recipe gives, and the plan that they make."""

from collections.abc import Callable, Mapping
from typing import Any

from edgedistill.methods import guided
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Plan

PLANS: Mapping[str, Callable[[Any, Context], Plan]] = {
    "guided": guided.plan,
}
