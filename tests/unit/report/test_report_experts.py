"""The drawings of experts: there when a run has them, true to the counts, safe in the page."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from octavo.report import experts, plots
from octavo.report.metrics import Metrics


def rows(n: int = 40, drops: bool = True) -> list[dict]:
    found = []
    for step in range(1, n + 1):
        row = {"kind": "train", "step": step, "tokens_seen": step * 512, "loss": 3.0 - step / n, "max_load": 1.5}
        for depth, load in {"2": [300, 100, 0, 0], "10": [10 * step, 10 * step, 10 * step, 10 * step]}.items():
            row |= {f"moe.load.{depth}": load, f"moe.max_load.{depth}": max(load) / (sum(load) / 4)}
            row |= {f"moe.dropped.{depth}": 0.1 / step} if drops else {}
        found.append(row)
    return found


def test_loads_are_the_counts_of_the_last_steps_over_the_mean_of_the_layer():
    depths, table = experts.loads(Metrics(train=rows()))
    assert depths == ["2", "10"], "in the order of the layers"
    np.testing.assert_allclose(table, [[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_a_run_with_experts_has_their_drawings():
    drawn = plots.draw(Metrics(train=rows()), stage="pretrain")
    names = [plot.name for plot in drawn]
    assert names[-3:] == ["pretrain-experts", "pretrain-expert-loads", "pretrain-expert-drops"]
    for plot in drawn[-3:]:
        assert not re.search(r"<style|<script|<metadata|https?:|<image", plot.svg)
        assert not any(colour in plot.svg for colour in plots.COLOURS.values())
        assert plot.png.startswith(b"\x89PNG")
    texts = [" ".join(ElementTree.fromstring(p.svg.replace("xlink:href", "href")).itertext()) for p in drawn[-3:]]
    assert "layer 2" in texts[0] and "layer 10" in texts[0] and "tokens seen" in texts[0]
    assert "expert; full colour is 2 times the mean load" in texts[1]
    shades = re.findall(r"opacity: ([\d.]+)", drawn[-2].svg)
    assert {"0.5", "0.03"} <= set(shades), shades


def test_without_drops_or_experts_there_is_no_drawing_of_them():
    named = [plot.name for plot in plots.draw(Metrics(train=rows(drops=False)), stage="x")]
    assert "x-experts" in named and "x-expert-drops" not in named
    dense = [{"step": row["step"], "loss": row["loss"]} for row in rows()]
    assert [plot.name for plot in plots.draw(Metrics(train=dense), stage="x")] == ["x-loss"]


def test_damaged_counts_are_passed_over():
    broken = rows()
    broken[-1]["moe.load.2"] = [1, 2]
    broken[-1]["moe.load.10"] = "x"
    broken[-2]["moe.load.x"] = [1]
    depths, table = experts.loads(Metrics(train=broken))
    assert depths == ["10"] and table.shape == (1, 4)
    plots.draw(Metrics(train=broken), stage="x")
