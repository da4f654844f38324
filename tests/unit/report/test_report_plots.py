"""The curves: which are drawn, what is in them, and that the SVG is safe inside a page."""

import math
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import metric_rows

from octavo.report import plots
from octavo.report.metrics import Metrics


def of(rows):
    return Metrics([r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "valid"])


@pytest.fixture(scope="module")
def drawn():
    rows = metric_rows(70, "pretrain")
    return plots.draw(of(rows), stage="pretrain", baselines={"trigram": 1.88, "6-gram": 1.69})


def test_every_curve_is_a_png_and_an_svg(drawn, tmp_path):
    names = ["loss", "bits-per-byte", "learning-rate", "gradient-norm", "throughput"]
    assert [plot.name for plot in drawn] == [f"pretrain-{name}" for name in names]
    paths = plots.write(drawn, tmp_path / "plots")
    for path in paths:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width > 600 and height > 400
    assert len(list((tmp_path / "plots").iterdir())) == 5


def test_axes_are_labelled_with_units_and_baselines_are_lines(drawn):
    texts = {p.name: " ".join(ElementTree.fromstring(_xml(p.svg)).itertext()) for p in drawn}
    assert "loss (nats per token)" in texts["pretrain-loss"] and "tokens seen" in texts["pretrain-loss"]
    bits = texts["pretrain-bits-per-byte"]
    assert "bits per byte" in bits and re.search(r"trigram\s+1\.880", bits) and re.search(r"6-gram\s+1\.690", bits)
    assert "tokens per second" in texts["pretrain-throughput"]


def _xml(svg: str) -> str:
    return svg.replace("xlink:href", "href")


def test_the_svg_needs_nothing_from_outside_and_takes_the_pages_colours(drawn):
    for plot in drawn:
        assert not re.search(r"<style|<script|<metadata|https?:|<image|\son\w+=", plot.svg)
        assert 'role="img"' in plot.svg and "width=" not in plot.svg.split(">")[0]
        assert "var(--plot-" in plot.svg
        assert not any(colour in plot.svg for colour in plots.COLOURS.values())
    ids = [name for plot in drawn for name in re.findall(r' id="([^"]+)"', plot.svg)]
    assert ids and len(ids) == len(set(ids))  # two drawings in one page must not share a clip path or marker
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', "".join(plot.svg for plot in drawn))) == set(ids)


def test_a_stage_without_data_has_no_curves():
    assert plots.draw(Metrics(), stage="tune") == []
    only_valid = Metrics(valid=[{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}])
    assert [plot.name for plot in plots.draw(only_valid, stage="tune")] == ["tune-loss"]


def test_nan_one_point_and_spikes_are_drawn():
    one = Metrics(train=[{"step": 1, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0}])
    assert [plot.name for plot in plots.draw(one, stage="tune")] == ["tune-loss"]
    rows = [{"step": s, "loss": math.nan if s % 3 else 2.0, "grad_norm": 1e4 if s == 50 else 1.0} for s in range(1, 90)]
    assert [plot.name for plot in plots.draw(Metrics(train=rows), stage="x")] == ["x-loss", "x-gradient-norm"]
    allnan = Metrics(train=[{"step": s, "loss": math.nan} for s in range(5)])
    assert plots.draw(allnan, stage="x") == []


def test_labels_of_near_levels_stay_apart_and_in_order():
    placed = plots.apart([0.5, 0.1, 0.52, 0.51], 0.1)
    assert placed == pytest.approx([0.5, 0.1, 0.7, 0.6])
    assert plots.apart([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert plots.apart([0.2, 0.8], 0.1) == [0.2, 0.8]


def test_ticks_are_short():
    values = (0, 500_000, 1e6, 1.5e6, 2.25e6, 100, 10, 1e4, 1.2e4, 1e5, 2e10, 0.5)
    texts = ["0", "500k", "1M", "1.5M", "2.25M", "100", "10", "10k", "12k", "100k", "20G", "0.5"]
    assert [plots.short_count(value) for value in values] == texts


def test_matplotlib_is_not_imported_before_something_is_drawn():
    import subprocess

    heavy = "{'matplotlib', 'torch'} & set(sys.modules)"
    code = f"import sys, octavo.report.page, octavo.cli.report; raise SystemExit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
