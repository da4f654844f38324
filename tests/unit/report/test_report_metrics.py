"""Metrics read back, whatever state the file is in."""

import json
import math

import numpy as np
import pytest

from octavo.report.metrics import Metrics, number, points, read, read_lines, smooth, thin


def test_a_half_written_last_line_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"kind": "train", "step": 1, "loss": 3.0}, {"kind": "valid", "step": 1, "loss": 3.1}]
    lines = [json.dumps(good[0]), "[1, 2]", "", "not json", json.dumps(good[1]), '{"kind": "train", "step": 2, "lo']
    path.write_bytes("\n".join(lines).encode() + b"\xff\xfe")
    assert read_lines(path) == good
    found = read(path)
    assert found.train == [good[0]] and found.valid == [good[1]]


def test_no_file_is_no_metrics(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []
    assert not read(tmp_path / "none.jsonl")
    assert read(tmp_path / "none.jsonl").last("loss") is None


def test_rows_are_ordered_by_step_and_the_later_of_two_wins(tmp_path):
    rows = [{"kind": "train", "step": s, "loss": loss} for s, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5))]
    rows += [{"kind": "sample", "step": 2, "text": t} for t in ("a", "b")]
    rows += [{"kind": "train", "loss": 9.0}, {"kind": "train", "step": "x"}, {"kind": "other", "step": 1}]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, rows)))
    found = read(tmp_path / "m")
    assert [row["loss"] for row in found.train] == [1.0, 2.5, 3.0]
    assert [row["text"] for row in found.samples] == ["a", "b"]


def test_nan_null_and_text_are_no_numbers(tmp_path):
    (tmp_path / "m").write_text(
        '{"kind": "train", "step": 1, "loss": NaN}\n{"kind": "train", "step": 2, "loss": 2.0}\n'
        '{"kind": "train", "step": 3, "loss": null}\n{"kind": "train", "step": 4, "loss": Infinity}\n'
    )
    found = read(tmp_path / "m")
    assert len(found.train) == 4
    x, y = points(found.train, "step", "loss")
    assert x.tolist() == [2.0] and y.tolist() == [2.0]
    assert found.last("loss") == 2.0
    assert [number(v) for v in (True, "1", None, math.nan, 10**400, 3)] == [None] * 5 + [3.0]


def test_seconds_of_the_logged_intervals_add_up():
    assert (
        Metrics(
            train=[{"step": 10, "seconds": 4.0}, {"step": 20, "seconds": None}, {"step": 30, "seconds": 0.5}]
        ).seconds
        == 4.5
    )
    assert Metrics(train=[{"step": 10}]).seconds is None


def test_tokens_at_a_step_lie_on_the_line_through_the_logged_ones():
    metrics = Metrics(train=[{"step": 10, "tokens_seen": 100}, {"step": 20, "tokens_seen": 300}])
    assert metrics.tokens_at(np.array([0, 5, 10, 15, 20, 30])).tolist() == [0, 50, 100, 200, 300, 450]
    assert Metrics().tokens_at(np.array([3])).tolist() == [3.0]


def test_smoothing_is_a_centred_mean_that_does_not_lag():
    line = np.arange(50, dtype=float)
    assert smooth(line, 5)[15:45] == pytest.approx(line[15:45])
    assert smooth([1.0, 2.0, 6.0, 3.0], 1).tolist() == [1.0, 2.0, 6.0, 4.5]
    assert smooth(np.full(7, 3.0)).tolist() == [3.0] * 7
    assert smooth([]).tolist() == []


def test_thinning_keeps_the_ends():
    x, y = thin(np.arange(10_000), np.arange(10_000) * 2, at_most=100)
    assert len(x) == 100 and x[0] == 0 and x[-1] == 9999 and (y == 2 * x).all()
    assert len(thin(np.arange(5))[0]) == 5
