"""The page: right figures, nothing invented, nothing that acts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write, write_lines
from typer.testing import CliRunner

from octavo.errors import ConfigError
from octavo.report import html, page, plots
from octavo.report.folder import Run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'-alert(3)-'",
    "</style><script>alert(4)</script>",
    "</title><svg onload=alert(5)>",
    "<!-- --><iframe src=//evil.example>",
    "&lt;b&gt;\u202e\x1b[2J\x00\ud800",
    '<a href="javascript:alert(6)">x</a>',
)
SECTIONS = ["Answers", "Scores", "Curves", "Samples through training", "What happened", "Data", "Tokenizer", "Model",
            "Go on", "Environment"]  # fmt: skip


class Reader(HTMLParser):
    """A page as a browser's parser sees it: its tags with attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text, self.source = "", source
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in html.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        if self.open and self.open[-1] != "style":
            self.text += data


def parsed(source: str) -> Reader:
    reader = Reader(source)
    assert reader.open == []
    return reader


def read(path: Path) -> Reader:
    return parsed(path.read_text(encoding="utf-8"))


DRAWN = {"pretrain": [plots.Plot("pretrain-loss", "Loss", "<svg></svg>", b"")]}


def rendered(run: Path) -> Reader:
    """The page of ``run`` without the seconds that its drawings take."""
    return parsed(page.render(Run(run), DRAWN))


@pytest.fixture(scope="module")
def built(finished_run, tmp_path_factory):
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("built") / "quickstart"))
    assert page.build(run) == run / "report.html"
    return run


def test_a_finished_run_has_every_section_and_its_figures(built):
    reader = read(built / "report.html")
    assert reader.titles == SECTIONS
    for figure in (
        "10.0k", "10,007 exactly", "2.29M", "1.55 passes", "5m 16s", "1.652", "trigram 1.880, 6\u2011gram 1.690",
        "71.2%", "95% interval 65% to 77%; always", "99.2%", "of 240 answers", "−0.228",
        "MFU, pretraining, median50.0%", "exactly the text the model was trained on",
        "near duplicate", "212 documents", "4,191 documents", "3.13 on the training text", "23.6M FLOP",
        "octavo chat", "blocks.block.mixer.n_kv_heads", "expected: doctest", "in order 558.", "Xeon",
    ):  # fmt: skip
        assert figure in reader.text, figure
    assert reader.text.count("✓ right") == 2 and reader.text.count("✗ wrong") == 2
    assert "not finished" not in reader.text
    assert len(list((built / "plots").glob("*.png"))) == 9
    links = {attrs["href"] for tag, attrs in reader.tags if tag == "a"}
    assert links == {f"#{attrs['id']}" for tag, attrs in reader.tags if tag == "section"}


def assert_harmless(reader: Reader) -> None:
    assert not {tag for tag, _ in reader.tags} & {"script", "img", "iframe", "object", "embed", "form", "link", "base"}
    for tag, attrs in reader.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("href", "xlink:href", "src"):
            assert (attrs.get(name) or "#").startswith("#")
        assert "url(http" not in (attrs.get("style") or "")


def test_the_page_stands_alone_and_forbids_scripts(built):
    reader = read(built / "report.html")
    assert_harmless(reader)
    source = (built / "report.html").read_text(encoding="utf-8")
    policy = next(
        attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'") and "script" not in policy
    assert source.index("Content-Security-Policy") < source.index("<style")
    assert not re.search(r"@import|https?://", source)
    assert "prefers-color-scheme: dark" in source and "@media print" in source and "viewport" in source


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_from_models_and_data_stays_text(copied, hostile):
    run = copied()
    spoil(run, hostile)
    reader = rendered(run)
    assert_harmless(reader)
    shown = html.text(hostile).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#x27;", "'")
    assert reader.text.count(shown.replace("&amp;", "&")) >= 8
    assert not set("\x1b\x00\u202e\ud800") & set(reader.source)


def spoil(run: Path, hostile: str) -> None:
    """Put ``hostile`` wherever a run keeps text, keys included."""
    scores = json.loads((run / "scores.json").read_text())
    for example in scores["answers"]["examples"]:
        example.update(question=hostile, given=hostile, answer=hostile)
    scores["answers"]["kinds"] = {hostile: scores["answers"]["kinds"]["module"]}
    scores["baseline"]["kind"] = hostile
    write(run / "scores.json", scores)
    example = {"source": hostile, "line": hostile, "excerpt": hostile, "detail": hostile}
    report = json.loads((run / "data/report.json").read_text())
    report["removed"] = {hostile: {"documents": 1, "bytes": 2, "examples": [example]}}
    write(run / "data/report.json", report | {"sources": [hostile]})
    sample = {"kind": "sample", "step": 3, "prompt": hostile, "text": hostile}
    write_lines(run / "pretrain/metrics.jsonl", [sample, {"kind": "train", "step": 1, "loss": 2.0}])
    write(run / "environment.json", {"cpu": hostile, hostile: hostile, "cpus": 2})
    recipe = {
        "name": hostile,
        "tokenizer": {"kind": hostile},
        "model": {hostile: hostile},
        "train": {hostile: [hostile]},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


PARTS = (
    "recipe.yaml", "environment.json", "stages.json", "scores.json", "data", "tokenizer", "pretrain", "tune", "model",
)  # fmt: skip
FILES = (
    "recipe.yaml", "environment.json", "stages.json", "scores.json", "data/report.json", "data/train/manifest.json",
    "tokenizer/tokenizer.json", "model/model.safetensors", "pretrain/metrics.jsonl",
)  # fmt: skip
DAMAGES = (b"", b"[1, 2", b"[[1]]", b"\xff\x00\xff" * 9, b'{"model": 3, "answers": [], "documents": "x"}')


@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_leaves_out_its_section_only(copied, missing):
    run = copied()
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    titles = rendered(run).titles
    gone = {"scores.json": {"Answers", "Scores"}, "data": {"Data"}, "tokenizer": {"Tokenizer"}}.get(missing, set())
    assert titles == [title for title in SECTIONS if title not in gone]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_file_counts_as_not_there(copied, name, content):
    run = copied()
    (run / name).write_bytes(content)
    assert "quickstart" in rendered(run).text


def test_a_run_stopped_in_the_middle_says_so_and_invents_nothing(copied):
    run = copied()
    for name in ("scores.json", "tune", "model", "base"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    stages = json.loads((run / "stages.json").read_text())
    write(run / "stages.json", {name: stages[name] for name in ("data", "tokenizer")})
    rows = [
        {"kind": "train", "step": s, "loss": 5.0 / s, "tokens_seen": 4096 * s, "seconds": 2.0} for s in range(1, 31)
    ]
    write_lines(run / "pretrain/metrics.jsonl", rows, end='{"ki')
    reader = read(page.build(run))
    assert "not finished: pretrain is under way or was interrupted, at step 30 of 560" in reader.text
    assert f"octavo resume {run}" in reader.text
    assert "1m 00s so far" in reader.text and "all stages so far" in reader.text
    assert not re.search(r"bits per byte\d|parameters\d|answers right|octavo chat", reader.text)


def test_nan_in_metrics_and_scores_is_left_out(copied):
    run = copied()
    scores = json.loads((run / "scores.json").read_text())
    scores["model"]["bits_per_byte"] = float("nan")
    scores["baseline"]["orders"]["3"]["bits_per_byte"] = float("inf")
    write(run / "scores.json", scores)
    rows = [{"kind": "train", "step": s, "loss": float("nan")} for s in range(9)]
    write_lines(
        run / "pretrain/metrics.jsonl",
        [*rows, {"kind": "valid", "step": 3, "loss": None, "bits_per_byte": float("nan")}],
    )
    shutil.rmtree(run / "tune")
    reader = read(page.build(run))
    assert not re.search(r"\bnan\b|\binf\b", reader.text)
    assert "Scores" in reader.titles and "model minus it" not in reader.text


def test_parameters_are_counted_from_the_files(finished_run):
    assert Run(finished_run).parameters == 400 * 25 + 7


def test_decode_state_is_counted_from_the_configuration(copied):
    run = copied()
    assert Run(run).state_bytes is None  # the made-up config.json says nothing but its family
    config = {"model_type": "llama", "vocab_size": 400, "hidden_size": 192, "num_hidden_layers": 4,
              "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 512,
              "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
              "tie_word_embeddings": True}  # fmt: skip
    write(run / "model/config.json", config)
    keys_and_values = 2 * 4 * 1 * 64 * 256 * 4
    assert Run(run).state_bytes == keys_and_values
    assert "512.0 KiB" in rendered(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        page.build(tmp_path)
    with pytest.raises(ConfigError):
        page.build(tmp_path / "missing")


def test_a_folder_name_with_blanks_is_quoted_in_commands(copied, tmp_path):
    run = copied().rename(tmp_path / "my run; rm -rf")
    assert f"octavo chat '{run}'" in rendered(run).text


def test_the_verb_writes_the_page_and_says_the_figures(copied):
    from octavo.cli.report import app

    run = copied()
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    assert str(run / "report.html") in result.output and (run / "report.html").is_file()
    assert "parameters" in result.output and "10.0k" in result.output and "trigram 1.880" in result.output
    assert "octavo report runs/quickstart" in CliRunner().invoke(app, ["--help"]).output


def test_tags_escape_by_construction():
    assert html.tag("p", "<b>", html.Html("<i>"), title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i></p>'
    assert html.tag("br") == "<br>" and html.tag("a", class_="x", id=None) == '<a class="x"></a>'
    assert html.section("Empty", html.Html("")) == "" and html.slug("What's <up>?") == "what-s-up"
