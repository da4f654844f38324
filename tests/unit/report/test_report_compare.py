"""Several runs on one page: right differences, only what can be compared, nothing foreign replaced."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import metric_rows, write, write_lines
from test_report_page import DAMAGES, FILES, HOSTILE, assert_harmless, parsed, read, spoil
from typer.testing import CliRunner

from octavo.errors import ConfigError
from octavo.report import compare, compare_plots, html
from octavo.report.compare import Figure, difference, differing
from octavo.report.folder import Run
from octavo.report.metrics import Metrics
from octavo.report.metrics import read as read_metrics

ALL = {"", "text", "tokens", "pretrain", "tune"}
BITS = "bits per byte, held-out text"


def change(run: Path, **sections) -> Path:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for name, value in sections.items():
        recipe[name] = {**recipe[name], **value} if isinstance(value, dict) else value
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run


@pytest.fixture
def pair(finished_run, tmp_path) -> list[Path]:
    """Two runs: the second is longer, of another rate and seed, slower and better."""
    runs = [Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("first", "second")]
    change(runs[0], name="one")
    change(runs[1], name="two", seed=9, train={"steps": 700, "lr": 0.1234567891}, eval=None)
    rows = metric_rows(700, "pretrain", seed=3)
    slower = [{**row, "seconds": 0.62, "tokens_per_second": 6600} if row["kind"] == "train" else row for row in rows]
    write_lines(runs[1] / "pretrain/metrics.jsonl", slower)
    for run, memory, source in zip(runs, (3 << 30, 6 << 30), ("a", "a"), strict=True):
        stages = json.loads((run / "stages.json").read_text())
        stages["data"]["source"] = source
        stages["tokenizer"]["vocab_size"] = 400
        stages["pretrain"]["peak_memory_bytes"] = memory
        write(run / "stages.json", stages)
        manifest = json.loads((run / "data/train/manifest.json").read_text())
        write(run / "data/train/manifest.json", {**manifest, "vocab_hash": "h"})
    scores = json.loads((runs[1] / "scores.json").read_text())
    scores["model"]["bits_per_byte"] = 1.5
    write(runs[1] / "scores.json", scores)
    return runs


@pytest.fixture
def undrawn(monkeypatch):
    """Without the seconds that drawings take."""
    monkeypatch.setattr(compare_plots, "draw", lambda stage, runs: [
        compare_plots.Drawing("loss", axis.name, "Loss", "<svg></svg>") for axis in compare_plots.AXES
    ])  # fmt: skip


def values(runs: list[Path]) -> dict[str, list[str]]:
    """The table of figures: name -> for each run its value and its difference."""
    sides = compare.open_sides(runs)
    same = compare.shared(sides)
    out = {}
    for figure, row in compare.figures(sides):
        out[figure.name] = [
            ("" if v is None else figure.show(v)) + f" {difference(figure, v, row[0], one)}".rstrip()
            for v, one in zip(row, same, strict=True)
        ]
    return out


def test_figures_and_their_differences(pair):
    found = values(pair)
    assert found["bits per byte, held-out text"] == ["1.652", "1.500 −0.152"]
    assert found["pretraining: steps"] == ["560", "700 +140"]
    assert found["pretraining: tokens seen"] == ["2.29M", "2.87M +25%"]
    assert found["pretraining: training time"] == ["2m 54s", "7m 14s +150%"]
    assert found["peak memory"] == ["3.0 GiB", "6.0 GiB +100%"]
    assert found["pretraining: tokens a second, median"][1].split() == ["6.60k", "−50%"]
    assert found["pretraining: share of the peak, median"] == ["50.0%", "50.0%"]
    assert found["answers right"] == ["71.2%", "71.2%"] and found["vocabulary"] == ["400", "400"]
    losses = [r["loss"] for r in read_metrics(pair[1] / "pretrain/metrics.jsonl").valid]
    assert found["pretraining: lowest held-out loss"][1].startswith(f"{min(losses):.3f} ")
    assert found["pretraining: held-out loss at the end"][1].startswith(f"{losses[-1]:.3f} ")


@pytest.mark.parametrize(
    ("spoilt", "gone", "left"),
    [
        ("vocab_hash", ("pretraining: lowest held-out loss", "tuning: lowest held-out loss"), BITS),
        ("source", ("pretraining: lowest held-out loss", BITS), "peak memory"),
        ("told", ("tuning: lowest held-out loss",), "pretraining: lowest held-out loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_has_no_difference_and_no_best(pair, undrawn, spoilt, gone, left):
    rows = metric_rows(240, "tune", seed=8)
    write_lines(pair[1] / "tune/metrics.jsonl", rows)
    before = values(pair)
    stages = json.loads((pair[1] / "stages.json").read_text())
    if spoilt == "vocab_hash":
        manifest = json.loads((pair[1] / "data/train/manifest.json").read_text())
        write(pair[1] / "data/train/manifest.json", {**manifest, "vocab_hash": "other"})
    elif spoilt == "source":
        stages["data"]["source"] = "b"
    else:
        for run, told in zip(pair, "xy", strict=True):
            stages = json.loads((run / "stages.json").read_text())
            stages["tune"]["told"] = told
            write(run / "stages.json", stages)
    write(pair[1] / "stages.json", stages)
    after = values(pair)
    page = compare.render(compare.open_sides(pair))
    for name in gone:
        assert " " in before[name][1] and " " not in after[name][1]
        row = page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0]
        assert row and "<strong>" not in row and "<small>" not in row
    assert after[left] == before[left] and " " in after[left][1]
    cautions = {"vocab_hash": "different tokenizers", "source": "did not read the same text", "told": ""}
    notice = page.partition('class="notice"')[2].partition("</p>")[0]
    assert cautions[spoilt] in notice and bool(notice) == bool(cautions[spoilt])


def test_the_best_of_a_row_is_bold_where_better_has_a_meaning(pair, undrawn):
    page = compare.render(compare.open_sides(pair))

    def cells(name: str) -> list[str]:
        row = page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0]
        return re.findall(r"<td[^>]*>(.*?)</td>", row)

    assert cells("bits per byte, held-out text") == ["1.652", "<strong>1.500</strong><small>−0.152</small>"]
    assert cells("peak memory")[0] == "<strong>3.0 GiB</strong>"
    assert cells("pretraining: tokens a second, median")[0].startswith("<strong>13.2k")
    assert cells("answers right") == ["71.2%", "71.2%"] and "<strong>" not in "".join(cells("pretraining: steps"))


def test_differences_are_read_as_people_say_them():
    loss, speed, share = (Figure("", lambda run: None, show, relative=r) for show, r in
                          ((compare._three, False), (compare._exact, True), (compare._percent, False)))  # fmt: skip
    assert difference(loss, 2.5, 2.0, ALL) == "+0.500" and difference(loss, 2.0, 2.5, ALL) == "−0.500"
    assert [difference(speed, v, 100.0, ALL) for v in (104.6, 150.0, 20.0, 400.0, 100.0)] == [
        "+4.6%", "+50%", "−80%", "4x", ""
    ]  # fmt: skip
    assert difference(share, 0.75, 0.5, ALL) == "+25.0 points" and difference(speed, 5.0, 0.0, ALL) == ""
    assert difference(loss, None, 2.0, ALL) == "" and difference(loss, 2.0, None, ALL) == ""
    assert difference(Figure("", lambda run: None, str, needs="text"), 1.0, 2.0, {"", "tokens"}) == ""


def test_only_settings_that_differ_are_shown_with_their_dotted_keys(pair, undrawn):
    recipes = [{k: v for k, v in Run(run).recipe.items() if k != "name"} for run in pair]
    found = differing(recipes)
    assert list(found) == ["seed", "train.steps", "train.lr", "eval", "eval.answers"]
    assert found["train.steps"] == ["560", "700"] and found["train.lr"] == ["–", "0.123457"]
    reader = parsed(compare.render(compare.open_sides(pair)))
    assert "train.steps" in reader.text and "model.d_model" not in reader.text
    assert "Those that differ; 12 others are equal." in reader.text


def test_values_that_only_look_equal_are_told_apart_and_sections_stay_together():
    near = differing([{"a": {"x": 0.12345678, "y": 1}, "b": 1}, {"a": {"x": 0.12345679, "y": 1, "z": 3}, "b": 2}])
    assert near == {"a.x": ["0.12345678", "0.12345679"], "a.z": ["–", "3"], "b": ["1", "2"]}
    assert list(near) == ["a.x", "a.z", "b"]
    assert differing([{"a": [1, 2]}, {"a": [1, 2]}]) == {} == differing([{}, {}])


def test_equal_runs_say_so(finished_run, tmp_path, undrawn):
    runs = [Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("a", "b")]
    text = parsed(compare.render(compare.open_sides(runs))).text
    assert "All settings of these runs are equal." in text and "Machine and versions are equal." in text
    assert "<small>" not in compare.render(compare.open_sides(runs)).partition("Settings")[0].partition("<table")[2]


def test_labels_tell_the_runs_apart(finished_run, tmp_path):
    first, second = (Path(shutil.copytree(finished_run, tmp_path / name / "run")) for name in "ab")
    third = Path(shutil.copytree(finished_run, tmp_path / "third"))
    labels = lambda *runs: [side.label for side in compare.open_sides(runs)]  # noqa: E731
    assert labels(first, third) == ["run", "third"]  # the recipes have one name, the folders do not
    assert labels(first, second) == [str(first), str(second)]
    assert labels(change(first, name="一号"), second) == ["一号", "quickstart"]


# ---- curves ----


def metrics_of(steps, seconds=0.5, valid=()):
    train = [{"step": s, "loss": 9.0 / s, "tokens_seen": 100 * s, "seconds": seconds} for s in steps]
    return Metrics(train, [{"step": s, "loss": 1.0} for s in valid])


def test_the_three_axes_place_the_same_values():
    metrics = metrics_of((1, 2, 4), valid=(3, 4))
    kinds = {kind.name: kind for kind in compare_plots.KINDS}
    axes = {axis.name: axis for axis in compare_plots.AXES}
    x = {name: compare_plots._curve(metrics, kinds["loss"], axis)[0].tolist() for name, axis in axes.items()}
    assert x == {"step": [1, 2, 4], "tokens": [100, 200, 400], "time": [0.5, 1.0, 1.5]}
    held = {name: compare_plots._curve(metrics, kinds["held-out"], axis)[0].tolist() for name, axis in axes.items()}
    assert held == {"step": [3, 4], "tokens": [300, 400], "time": [1.25, 1.5]}


def test_seconds_are_summed_and_kept_on_with():
    metrics = metrics_of((10, 20), seconds=2.0)
    assert metrics.seconds_at(np.array([0, 5, 10, 15, 20, 30])).tolist() == [0, 1, 2, 3, 4, 6]
    assert np.isnan(Metrics(valid=[{"step": 1}]).seconds_at(np.array([1.0]))).all()


def test_every_curve_is_drawn_over_every_axis_it_can_be_drawn_over(pair, monkeypatch):
    monkeypatch.setattr(compare_plots, "KINDS", compare_plots.KINDS[:2])
    runs = [read_metrics(run / "pretrain/metrics.jsonl") for run in pair]
    drawn = compare_plots.draw("pretrain", runs)
    assert len(drawn) == len(compare_plots.KINDS) * 3 and len({d.svg for d in drawn}) == len(drawn)
    for one in drawn:
        assert not re.search(r"<style|<script|<metadata|https?:|<image|\son\w+=", one.svg)
        assert f"{one.title}, over" in one.svg and "var(--plot-blue)" in one.svg and "var(--plot-orange)" in one.svg
    ids = [name for one in drawn for name in re.findall(r' id="([^"]+)"', one.svg)]
    assert len(ids) == len(set(ids))
    timeless = [Metrics([{k: v for k, v in row.items() if k != "seconds"} for row in runs[0].train])]
    assert {d.axis for d in compare_plots.draw("pretrain", timeless)} == {"tokens", "step"}
    assert compare_plots.draw("tune", [Metrics(), Metrics()]) == []


def test_twelve_runs_have_twelve_lines():
    lines = {compare_plots.line_of(i) for i in range(compare_plots.MAX_RUNS)}
    assert len(lines) == compare_plots.MAX_RUNS
    first = [compare_plots.line_of(i) for i in range(4)]
    assert len({colour for colour, _ in first}) == len({dashes for _, dashes in first}) == 4


# ---- the page ----


def test_the_page_stands_alone_and_is_written_beside_the_first_run(pair, monkeypatch):
    monkeypatch.setattr(compare_plots, "KINDS", compare_plots.KINDS[1:4])
    page = compare.build(pair)
    assert page == pair[0] / "comparison-with-second.html"
    reader = read(page)
    assert reader.titles == ["Figures", "Settings", "Curves", "Last samples", "Environment", "Runs"]
    assert_harmless(reader)
    assert not re.search(r"@import|https?://", reader.source) and "prefers-color-scheme: dark" in reader.source
    assert {a["href"] for t, a in reader.tags if t == "a"} == {f"#{a['id']}" for t, a in reader.tags if t == "section"}
    radios = [attrs for name, attrs in reader.tags if name == "input"]
    assert [a["id"] for a in radios] == ["by-tokens", "by-step", "by-time"] and "checked" in radios[0]
    for axis in ("tokens", "step", "time"):
        assert reader.source.count(f'class="over-{axis}"') == 5  # 3 of pretraining, 2 of tuning: no bits per byte
        assert f"main:has(#by-{axis}:checked)" in reader.source
    assert "one" in reader.text and "two" in reader.text and "in order 699." in reader.text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_from_models_and_data_stays_text(pair, undrawn, hostile):
    for run in pair:
        spoil(run, hostile)
    change(pair[1], tokenizer={"kind": f"{hostile}2"})
    reader = parsed(compare.render(compare.open_sides(pair)))
    assert_harmless(reader)
    shown = html.text(hostile).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#x27;", "'")
    assert reader.text.count(shown.replace("&amp;", "&")) >= 3
    assert not set("\x1b\x00\u202e\ud800") & set(reader.source)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", DAMAGES[:3])
def test_a_damaged_file_counts_as_not_there(pair, undrawn, name, content):
    (pair[0] / name).write_bytes(content)
    assert "2 runs" in parsed(compare.render(compare.open_sides(pair))).text


def test_a_run_under_way_and_one_that_only_began_can_be_compared(pair, undrawn, tmp_path):
    stages = json.loads((pair[1] / "stages.json").read_text())
    write(pair[1] / "stages.json", {name: stages[name] for name in ("data", "tokenizer")})
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text("name: new\ntrain: {steps: 3}\n")
    reader = parsed(compare.render(compare.open_sides([*pair, tmp_path / "new"])))
    assert "These runs are not finished: two, new." in reader.text and not re.search(r"\bnan\b|\binf\b", reader.text)


def test_only_our_own_pages_are_replaced(pair, undrawn, tmp_path):
    page = compare.build(pair)
    assert compare.build(pair) == page  # again
    page.write_text("<p>my notes</p>")
    with pytest.raises(ConfigError, match="is not a page of Octavo and stays as it is"):
        compare.build(pair)
    assert page.read_text() == "<p>my notes</p>"
    assert compare.build(pair, tmp_path / "elsewhere.html").is_file()
    with pytest.raises(ConfigError, match="is a folder"):
        compare.build(pair, tmp_path)
    before = {path.name for path in pair[1].rglob("*")}
    compare.build(pair[::-1], tmp_path / "elsewhere.html")
    assert {path.name for path in pair[1].rglob("*")} == before


def test_the_default_name_says_which_runs_and_is_never_too_long(finished_run, tmp_path):
    names = ["first", "a b/c".replace("/", "_"), "语" * 70, "other"]
    runs = [Path(shutil.copytree(finished_run, tmp_path / name)) for name in names]
    name = compare.default_name(compare.open_sides(runs[:2]))
    assert name == "comparison-with-a_b_c.html"
    long = compare.default_name(compare.open_sides(runs))
    assert len(long.encode()) < 120 and long != compare.default_name(compare.open_sides(runs[:3]))


def test_refusals(pair, tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        compare.build([pair[0], tmp_path])
    with pytest.raises(ConfigError, match="is given twice"):
        compare.build([pair[0], pair[1], pair[0].parent / "." / "first"])
    many = [Path(shutil.copytree(pair[0], tmp_path / f"r{i}")) for i in range(13)]
    with pytest.raises(ConfigError, match="13 runs are too many"):
        compare.build(many)


def test_the_verb_compares_and_prints_the_figures(pair, undrawn, tmp_path):
    from octavo.cli.report import app

    result = CliRunner().invoke(app, [*map(str, pair)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["one", "two"] and str(pair[0] / "comparison-with-second.html") in lines[-1]
    bits = next(line for line in lines if line.startswith("bits per byte"))
    assert bits.split()[-3:] == ["1.652", "1.500", "(−0.152)"]
    out = tmp_path / "single.html"
    for stage in ("pretrain", "tune"):
        (pair[0] / stage / "metrics.jsonl").unlink()
    before = set(pair[0].rglob("*"))
    assert CliRunner().invoke(app, [str(pair[0]), "--out", str(out)]).exit_code == 0
    assert "Octavo run report" in out.read_text() and set(pair[0].rglob("*")) == before
    out.write_text("mine")
    refused = CliRunner().invoke(app, [str(pair[0]), "--out", str(out)])
    assert isinstance(refused.exception, ConfigError) and out.read_text() == "mine"


def test_peak_memory_stands_on_the_page_of_a_run(pair):
    assert Run(pair[0]).peak_memory == 3 << 30
    from octavo.report import sections

    assert "peak memory" in sections.machine(Run(pair[0])) and "3.0 GiB" in sections.machine(Run(pair[0]))
