"""What layers report of a step beside its loss, as the console, the metrics file and the page show it.

``loss.NAME`` are sums that were trained on; ``moe.load.DEPTH`` counts how often each expert of a layer was chosen,
``moe.dropped.DEPTH`` what it had no room for. Anything else is written down as it is.
"""

from __future__ import annotations

from typing import Any

from octavo.nn.contracts import Aux

TRAINED, LOAD, DROPPED = "loss.", "moe.load.", "moe.dropped."


def gathered(total: Aux, more: Aux) -> Aux:
    """The figures of a step so far and those of another micro-batch, without gradients."""
    more = {name: value.detach() for name, value in more.items()}
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}


def headline(figures: Aux, weight: float) -> dict[str, float]:
    """For the console and every line of the log: losses beside the objective's, the least even layer, what was dropped.

    Args:
        weight: the objective's for the step, which losses are divided by.
    """
    found = {name: float(value) / weight for name, value in figures.items() if name.startswith(TRAINED)}
    if layers := by_layer(figures):
        found["max_load"] = max(layer["max_load"] for layer in layers.values())
        dropped = [float(value) for name, value in figures.items() if name.startswith(DROPPED)]
        if dropped:
            chosen = sum(float(value.sum()) for name, value in figures.items() if name.startswith(LOAD))
            found["dropped"] = sum(dropped) / max(chosen, 1.0)
    return found


def by_layer(figures: Aux) -> dict[str, dict[str, float]]:
    """For each layer with experts ``max_load``, the busiest expert's load over the mean, and ``dropped``, a share."""
    found = {}
    for name, value in figures.items():
        if name.startswith(LOAD):
            depth, load = name.removeprefix(LOAD), value.double()
            found[depth] = {"max_load": float(load.max() / load.mean().clamp(min=1e-9))}
            if (lost := figures.get(DROPPED + depth)) is not None:
                found[depth]["dropped"] = float(lost) / max(float(load.sum()), 1.0)
    return found


def written(figures: Aux) -> dict[str, Any]:
    """For a line of the metrics file, flat: the counts themselves, then each layer's ``moe.NAME.DEPTH``."""
    found: dict[str, Any] = {n: v.tolist() for n, v in figures.items() if not n.startswith((TRAINED, DROPPED))}
    return found | {
        f"moe.{name}.{depth}": value for depth, layer in by_layer(figures).items() for name, value in layer.items()
    }
