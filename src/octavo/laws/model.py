"""Running the laws on models: the table, and the small models in which one component is examined."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.laws import counting, decoding, reading
from octavo.laws.components import find
from octavo.laws.result import LawResult, verdict
from octavo.laws.subject import Subject
from octavo.models.tables import MODELS
from octavo.nn.contracts import Capabilities
from octavo.schema import Config


@dataclass(frozen=True)
class Law:
    """A property: what it says in one line, how it is tested, and which promise it is asked of."""

    says: str
    holds: Callable[[Subject], None]
    asked: Callable[[Capabilities], bool] = lambda capabilities: True
    slow: bool = False


LAWS: dict[str, Law] = {
    "causal": Law("no output depends on a later token", reading.causal, lambda c: c.causal),
    "packed": Law("documents in one row do not mix", reading.packed, lambda c: c.packed),
    "padding": Law("padding on any side is invisible, also to what follows", reading.padding),
    "rows": Law("a row alone equals the row in a batch", reading.rows, lambda c: c.batch_independent),
    "gradients": Law("every parameter gets a gradient", reading.gradients),
    "deterministic": Law("the same seed and input give the same bits", reading.deterministic),
    "hidden_states": Law("the named outputs belong together", reading.hidden_states),
    "twins": Law("every backend equals the plain one, gradients too", reading.twins),
    "incremental": Law("prefill and decode in any cut equal one pass", decoding.incremental, lambda c: c.incremental),
    "state": Law("a state can be copied, restored and cut back", decoding.state, lambda c: c.incremental),
    "constant_state": Law("the state does not grow", decoding.constant_state, lambda c: c.constant_state),
    "config": Law("the configuration survives being written", counting.config),
    "parameters": Law("predicted = counted parameters", counting.parameters),
    "flops": Law("predicted = counted FLOPs on the plain backend", counting.flops),
    "state_bytes": Law("predicted = held state bytes", counting.state_bytes),
    "compilable": Law("torch.compile finds no graph break", reading.compilable, lambda c: c.compilable, slow=True),
}


def check(
    config: Config | Mapping[str, Any], laws: Collection[str] | None = None, *, seed: int = 0, slow: bool = False
) -> list[LawResult]:
    """Every law (or those named) on a model of ``config``, in float64 with random weights.

    Args:
        config: a model's configuration, or plain values of one (``kind`` defaults to decoder). A user's own
            component stands in it as ``kind: "package.module:Class"``.
        slow: also laws that take seconds (compilation).

    Raises:
        ValueError: an unknown law, or values that are no configuration.
    """
    if unknown := set(laws or ()).difference(LAWS):
        raise ValueError(f"there is no law {sorted(unknown)}; the laws are {', '.join(LAWS)}")
    values: Any = config  # one of several configurations, which share a base
    if not isinstance(config, Config):
        values = MODELS[config.get("kind", "decoder")].Config.model_validate(dict(config))
    subject = Subject(values, seed)
    chosen = {name: law for name, law in LAWS.items() if (name in laws if laws else slow or not law.slow)}
    try:
        promised = subject.model.capabilities
    except Exception as error:
        return [LawResult("build", "broken", f"{type(error).__name__}: {error}".splitlines()[0])]
    return [verdict(name, law.holds, subject, asked=law.asked(promised)) for name, law in chosen.items()]


def check_component(kind: str, *, slow: bool = False, **settings: Any) -> dict[str, list[LawResult]]:
    """Every law on each of ``models_around`` a component: a table's name or ``package.module:Class``."""
    return {
        name: check(config, seed=seed, slow=slow)
        for seed, (name, config) in enumerate(models_around(kind, **settings).items())
    }


def models_around(kind: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Small models that put a component to every use: for a mixer alone, between attention layers, in each topology.

    ``kind`` is the name of a component of any table (see ``octavo.laws.components``) or ``package.module:Class``. A
    channel mixer of the table, and any mixer of one's own, stands beside attention.
    """
    return find(kind).models(**settings)
