"""The page of encoders and classifiers: hidden tokens, classes and tags with their intervals, who is taken for whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write
from test_report_page import HOSTILE, assert_harmless, rendered

from octavo.eval.classes import judge, judge_masked
from octavo.eval.tags import judge_tags
from octavo.report import labels, page
from octavo.report.folder import Run
from octavo.report.next_step import try_command

GIVEN = np.array([0] * 30 + [1] * 20)
SAID = np.array([0] * 27 + [1] * 3 + [1] * 16 + [0] * 4)


def run_of(folder: Path, scores: dict, **recipe) -> Run:
    import yaml

    write(folder / "scores.json", scores)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "labels", "eval": {}, **recipe}))
    write(folder / "stages.json", {"tune": {"seconds": 3.0}} if "tune" in recipe else {"pretrain": {"seconds": 3.0}})
    return Run(folder)


@pytest.mark.rows("A2")
def test_classes_with_intervals_and_who_is_taken_for_whom(tmp_path):
    scores = {"classes": judge(GIVEN, np.eye(2)[SAID], ("neg", "pos"), "single_label")}
    run = run_of(tmp_path, scores, tune={"data": {"kind": "labelled"}})
    ((name, value, remark),) = labels.facts(run)
    assert (name, value) == ("texts right", "86.0%") and "always the commonest class: 60.0%" in remark
    low, high = scores["classes"]["interval_95"]
    assert low < 0.86 < high and f"95% interval {100 * low:.1f}% to {100 * high:.1f}%" in remark
    reader = rendered(tmp_path)
    assert "Classes" in reader.titles and "Tags" not in reader.titles
    for figure in ("always the commonest60.0%", "macro F1", "neg273pos416", "50 texts that were held out"):
        assert figure in reader.text, figure
    shades = [attrs["style"] for tag, attrs in reader.tags if "share" in (attrs.get("class") or "")]
    assert shades == ["--share:54%", "--share:6%", "--share:12%", "--share:48%"]
    assert try_command(run, "runs/x") == 'echo "a text" | octavo classify runs/x'


@pytest.mark.rows("A1")
def test_hidden_tokens_with_their_interval(tmp_path):
    parts = [np.array([[10.0, 8, 4], [9.0, 8, 2]]), np.array([[4.0, 4, 3]])]
    found = judge_masked(parts)
    assert found["tokens"] == 20 and found["accuracy"] == 9 / 20 and found["nats_per_token"] == 23 / 20
    assert found["interval_95"][0] < 9 / 20 < found["interval_95"][1]
    train = {"objective": {"kind": "masked"}, "steps": 3}
    run = run_of(tmp_path, {"masked": found}, model={"causal": False}, train=train, data={"sources": ["x"]})
    assert run.reads_both_ways
    reader = rendered(tmp_path)
    assert "Hidden tokens" in reader.titles and "45.0%" in reader.text and "1.150" in reader.text
    assert try_command(run, "runs/x") == 'echo "a text" | octavo embed runs/x'


@pytest.mark.rows("A2")
def test_tags_and_spans_by_type(tmp_path):
    names = ("O", "B-PER", "I-PER")
    found = judge_tags([[1, 2, 0], [0, 1]], [[1, 2, 0], [0, 0]], names)
    run = run_of(tmp_path, {"tags": found}, tune={"data": {"kind": "tagged"}})
    assert [name for name, _, _ in labels.facts(run)] == ["words right", "span F1"]
    reader = rendered(tmp_path)
    assert "Tags" in reader.titles
    assert "PER211.0000.5000.667" in reader.text and "all spans211.0000.5000.667" in reader.text
    assert "5 words of 2 sentences" in reader.text


def test_damaged_and_hostile_scores_break_nothing(tmp_path):
    many = [f"c{i}" for i in range(40)]
    for classes in (
        {"texts": "x", "confusion": 3},
        {"texts": 3, "classes": ["a"], "confusion": [[1, 2]], "accuracy": None},
        {"texts": 3, "classes": list(HOSTILE), "confusion": [[1] * len(HOSTILE)] * len(HOSTILE), "accuracy": 0.5},
        {"texts": 3, "classes": many, "confusion": [[i] * 40 for i in range(40)], "accuracy": 0.5},
        {"texts": 3, "mean_squared_error": 0.25, "interval_95": [0.1, None]},
    ):
        run_of(tmp_path, {"classes": classes, "tags": classes, "masked": [1]}, tune={"data": {"kind": "labelled"}})
        reader = rendered(tmp_path)
        assert_harmless(reader)
    assert "0.2500" in reader.text
    write(
        tmp_path / "scores.json", {"classes": {"texts": 3, "classes": many, "confusion": [[i] * 40 for i in range(40)]}}
    )
    text = page.render(Run(tmp_path), {})
    assert "The 14 commonest of 40 are shown" in text and "c39" in text and "c3<" not in text
