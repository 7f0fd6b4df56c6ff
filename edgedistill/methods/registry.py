"""The methods by name: the settings that a recipe gives, and the plan that they make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.methods import codi, ctm, dmd2, guide, guided, lowdiff, msd, sfd
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Plan


@dataclass(frozen=True)
class Method:
    """A method.

    Fields:
        settings: A frozen dataclass whose fields all have defaults.
        plan: Lays out roles, phases and students.
    """

    settings: type
    plan: Callable[[Any, Context], Plan]


METHODS: Mapping[str, Method] = {
    "codi": Method(codi.CodiSettings, codi.plan),
    "ctm": Method(ctm.CtmSettings, ctm.plan),
    "dmd2": Method(dmd2.DMD2Settings, dmd2.plan),
    "guide": Method(guide.GuideSettings, guide.plan),
    "guided": Method(guided.GuidedSettings, guided.plan),
    "lowdiff": Method(lowdiff.LowdiffSettings, lowdiff.plan),
    "msd": Method(msd.MSDSettings, msd.plan),
    "sfd": Method(sfd.SfdSettings, sfd.plan),
}
