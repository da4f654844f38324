"""The properties every component must have, runnable on any component, also on a user's own.

    laws.check(config)                            every law on a model of this configuration
    laws.check_component("my_package.mine:Mixer") the same, in small models built around one mixer
    laws.check_objective(objective)               accumulation is exact, masks are masks
    laws.check_loader(loader)                     resumed = uninterrupted, ranks partition

Each gives one ``LawResult`` a law. What a component's capabilities do not promise is not asked.
"""

from octavo.laws.loader import check_loader
from octavo.laws.model import check, check_component, models_around
from octavo.laws.objective import check_objective
from octavo.laws.result import LawResult, Status

__all__ = ["LawResult", "Status", "check", "check_component", "check_loader", "check_objective", "models_around"]
