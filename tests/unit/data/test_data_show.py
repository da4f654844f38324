"""What is shown is what was trained on, token by token, and nothing is changed by looking."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from recipes import tiny_recipe

from octavo import feed, launch
from octavo.cli.main import main
from octavo.config import Recipe
from octavo.data import show
from octavo.data.loader import Loader
from octavo.data.pack import StreamRows, WholeRows
from octavo.data.show import Token, Told, lines, spans, to_html, to_plain, to_rich
from octavo.errors import ConfigError
from octavo.pipeline import judging
from octavo.tokenizer import Byte, ByteBPE, Tokenizer, train
from octavo.training.progress import Console

CHINESE = "人工智能看见了月亮，三次。" * 8


def tree(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its recipe's path, and every batch its training asked for."""
    folder = tmp_path_factory.mktemp("shown")
    rows = [{"instruction": f"问题 {i} <|im_end|>?", "input": "", "output": "答" * (3 + 6 * i)} for i in range(8)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tune = {"data": {"kind": "chat", "paths": [str(folder / "long.jsonl")]}, "held_out": 0.25}
    raw = tiny_recipe(folder, eval=None, tune=tune, train={"valid_batches": 1, "micro_batch_rows": 1})
    raw["data"]["sources"].append({"path": str(folder / "zh.txt"), "document_bytes": 128, "weight": 2.0})
    (folder / "zh.txt").write_text(CHINESE)
    raw["data"]["clean"] = {"near_duplicates": None, "exact_duplicates": False, "filters": None}
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    seen, real = {}, Loader._make

    def make(self, step, rank, world):
        batch = real(self, step, rank, world)
        seen[len(self.datasets), step] = batch
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "_make", make)
        patch.setattr(judging, "report", lambda _: {})  # its drawings take seconds
        launch.run(Recipe.parse(raw), out=folder / "run", console=Console("quiet"), workers=1)
    return folder / "run", folder / "recipe.yaml", seen


def assert_same(rows: list[show.Row], batch: dict[str, np.ndarray]) -> None:
    """Every slot of every row shown is the one the model was given."""
    for row in rows:
        given = {name: values[row.number] for name, values in batch.items()}
        shown = [token for part in row.parts for token in part.tokens if token.slot >= 0]
        assert [token.slot for token in shown] == np.flatnonzero(given["valid"]).tolist()
        assert [token.id for token in shown] == given["tokens"][given["valid"]].tolist()
        assert [token.position for token in shown] == given["positions"][given["valid"]].tolist()
        documents = [k for k, part in enumerate(row.parts) for token in part.tokens if token.slot >= 0]
        assert documents == given["doc_ids"][given["valid"]].tolist()
        # A token is trained exactly where it is a target of the loss.
        for part in row.parts:
            follows = [given["loss_mask"][token.slot] for token in part.tokens if token.slot >= 0]
            trained = [token.state == "trained" for token in part.tokens[1 : len(follows) + 1]]
            assert trained == [bool(mask) for mask in follows[: len(trained)]]
            last = part.tokens[part.piece.slots] if len(part.tokens) > part.piece.slots else None
            if last is not None and last.state != "unseen":
                assert last.id == given["targets"][part.piece.start + part.piece.slots - 1]
        assert row.trained == int(given["loss_mask"].sum()) and row.padding == int((~given["valid"]).sum())


@pytest.mark.parametrize(("stage", "sources", "steps"), [("pretrain", 2, 8), ("tune", 1, 6)])
def test_a_step_shown_is_the_batch_that_training_was_given(run, stage, sources, steps):
    folder, path, seen = run
    recipe = Recipe.load(path)
    for step in range(steps):
        look = feed.look(recipe, folder, stage, step=step, n=99)
        assert len(look.rows) == len(seen[sources, step]["tokens"]) == 2
        assert_same(look.rows, seen[sources, step])


def test_the_held_out_rows_are_those_of_every_validation(run):
    folder, path, _ = run
    recipe = Recipe.load(path)
    assert recipe.train is not None
    found = feed.of_stage(recipe, folder, "pretrain")
    assert found.valid is not None
    batches = list(feed.validation_batches(found.valid, found.source, recipe.train))
    assert len(batches) > 2
    for number in (0, 2):
        rows = feed.look(recipe, folder, "pretrain", split="valid", step=number, n=9).rows
        assert_same(rows, batches[number])
        for part in (part for row in rows for part in row.parts):
            document = found.valid.shards.document(part.piece.number)[part.piece.offset :]
            assert [token.id for token in part.tokens] == document[: part.piece.tokens].tolist()


def test_a_piece_is_the_part_of_the_document_it_says(run):
    folder, path, _ = run
    recipe = Recipe.load(path)
    for step in range(4):
        for row in feed.look(recipe, folder, "pretrain", step=step, n=9).rows:
            for part in row.parts:
                shards = feed.of_stage(recipe, folder, "pretrain").source.datasets[0].shards
                document = shards.document(part.piece.number)
                assert part.piece.length == len(document)
                ids = [token.id for token in part.tokens]
                assert ids == document[part.piece.offset : part.piece.offset + part.piece.tokens].tolist()
                source, line = part.origin.rsplit(":", 1)
                text = Tokenizer.load(folder / "tokenizer").decode(document)
                if source.endswith("zh.txt"):
                    assert text in CHINESE
                else:
                    assert json.loads(Path(source).read_text().splitlines()[int(line) - 1])["text"] == text


def test_what_is_cut_off_is_shown_and_counted(run):
    folder, path, _ = run
    parts = {}
    for step in range(6):
        for row in feed.look(Recipe.load(path), folder, "tune", step=step, n=9).rows:
            parts.update({part.piece.number: part for part in row.parts})
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert any(part.cut for part in parts.values()) and any(part.cut > show.UNSEEN_SHOWN for part in parts.values())
    for part in parts.values():
        line = int(part.origin.rsplit(":", 1)[1])
        messages = [
            {"role": "user", "content": f"问题 {line - 1} <|im_end|>?"},
            {"role": "assistant", "content": "答" * (6 * line - 3)},
        ]
        rendered = tokenizer.render(messages)
        ids = [token.id for token in part.tokens]
        assert ids == rendered.ids[: len(ids)] and part.cut == max(0, len(rendered.ids) - 65)
        assert len(ids) == min(len(rendered.ids), 65 + show.UNSEEN_SHOWN)
        for token, mask in zip(part.tokens[:65], rendered.loss_mask, strict=False):
            assert (token.state == "trained") == bool(mask)
        assert {token.state for token in part.tokens[65:]} <= {"unseen"}


def tokens_of(tokenizer, text, state="read"):
    return [Token(i, tokenizer.token_bytes(i), state) for i in tokenizer.encode(text)]


def test_a_character_of_several_tokens_is_shown_whole_and_a_cut_one_as_bytes():
    byte = train(Byte(), ["x"])
    you = tokens_of(byte, "a你")
    assert [(s.text, len(s.tokens)) for s in spans(you)] == [("a", 1), ("你", 3)]
    assert [s.text for s in spans(you[:-1])] == ["a", "⟨E4 BD⟩"]
    assert [s.text for s in spans(you[2:])] == ["⟨BD⟩", "⟨A0⟩"]
    # Half of the character is trained: then it is two things.
    half = [*you[:2], *(Token(t.id, t.raw, "trained") for t in you[2:])]
    assert [(s.text, s.state) for s in spans(half)] == [
        ("a", "read"), ("⟨E4⟩", "read"), ("⟨BD⟩", "trained"), ("⟨A0⟩", "trained")
    ]  # fmt: skip
    with_ids = "".join(bit.text for line in lines(you, with_ids=True) for bit in line)
    assert with_ids == "a:102 ⟨E4⟩:233 ⟨BD⟩:194 ⟨A0⟩=你:165 "
    # A token may end one character and hold the next ones.
    assert show.shown_bytes(b"\xa0 \xe4\xbd\xa0\xe4\xbd", "␣") == "⟨A0⟩␣你⟨E4 BD⟩"
    assert show.shown_bytes(b"") == "∅"


@pytest.mark.parametrize("kind", [Byte(), ByteBPE(vocab_size=300)])
def test_the_text_shown_is_the_text(kind):
    tokenizer = train(kind, [CHINESE, "the cat and the dog " * 9])
    text = "the cat 看见了 月亮\tand é 👩‍🚀\n\nthe end"
    shown = "".join(
        bit.text + "\n" * bit.text.endswith("⏎") for line in lines(tokens_of(tokenizer, text)) for bit in line
    )
    assert shown.replace("⏎", "").replace("⇥", "\t") == text


def one_row(tokenizer, ids, mask, seq_len=64):
    packed = WholeRows([(ids, mask)], seq_len)
    batch = packed.rows(0, np.array([0]))
    return show.rows_of(batch, [(packed, 0, 0)], tokenizer, lambda _: Told("file.jsonl:3", ids))


def test_a_special_token_differs_from_text_that_spells_it():
    tokenizer = train(ByteBPE(vocab_size=300), ["abc"])
    rendered = tokenizer.render(
        [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "ok\x1b[2J\u202e"}]
    )
    rows = one_row(tokenizer, rendered.ids, rendered.loss_mask)
    plain = to_plain(rows, "conversation")
    assert "<|im_end|>«<|im_end|>»" in plain and "«<|im_start|>»assistant" in plain
    assert "⟦ok␛[2J\ufffd«<|im_end|>»⟧⟪⏎⟫" in plain and not {"\x1b", "\u202e"} & set(plain)
    rich = to_rich(rows, "conversation")
    styles = {text.plain[span.start : span.end]: str(span.style) for text in rich for span in text.spans}
    assert styles["<|im_start|>"] == "reverse" and styles["trained"] == "bold green" and styles["⏎"] == "red strike"
    assert not {"\x1b", "\u202e"} & set("".join(text.plain for text in rich))


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</style>&lt;\x1b"])
def test_the_page_escapes_all_text_and_stands_alone(hostile):
    tokenizer = train(Byte(), ["x"])
    ids = [5 + b for b in (hostile + " 你").encode()]
    rows = one_row(tokenizer, ids, [1] * len(ids))
    rows[0].parts[0] = show.Part(rows[0].parts[0].piece, rows[0].parts[0].tokens, 0, hostile)
    page = to_html(rows, hostile, title=hostile, lead=hostile, with_ids=True)
    body = page.partition("<body>")[2]
    assert set(re.findall(r"<(\w+)", body)) <= set("header main section div ul li p h1 h2 span sub small br".split())
    assert all(name in ("class", "id", "title") for name in re.findall(r'<\w+ (\w+)="[^"]*"', body))
    assert not re.search(r"https?:|<script|<img|\x1b", page) and "default-src 'none'" in page
    assert 'title="id 233, trained, slot' in page and "你<sub>3</sub>" in page and "bytes E4" in page


def test_the_verb_shows_a_run_and_a_recipe_alike_and_changes_nothing(run, capsys, tmp_path, monkeypatch):
    folder, path, _ = run
    before = tree(folder)
    for stage in ("pretrain", "tune"):
        assert main(["data", "show", str(folder), "--stage", stage, "--step", "3", "--rows", "2"]) == 0
        of_run = capsys.readouterr()
        assert f"tiny: {stage}, step 3 of" in of_run.out and "row 1 " in of_run.out and "\x1b" not in of_run.out
        assert "⟦" in of_run.out and "-- " + ("document" if stage == "pretrain" else "conversation") in of_run.out
        words = ["data", "show", str(path), "--stage", stage, "--step", "3", "--rows", "2", "--workers", "1"]
        assert main(words) == 0
        assert capsys.readouterr().out == of_run.out
    assert main(["data", "show", str(folder), "--split", "valid", "--html", str(tmp_path / "rows.html")]) == 0
    assert "held out" in (tmp_path / "rows.html").read_text()
    assert tree(folder) == before


def test_every_piece_says_whether_it_is_whole_and_where_it_stands(run, capsys):
    """Of each document or conversation: whole with its tokens, or which of its tokens and where the rest is."""
    folder, path, _ = run
    found = []
    for stage, step in itertools.product(("pretrain", "tune"), range(6)):
        parts = [part for row in feed.look(Recipe.load(path), folder, stage, step=step, n=9).rows for part in row.parts]
        main(["data", "show", str(folder), "--stage", stage, "--rows", "9", "--step", str(step)])
        shown = capsys.readouterr().out
        whole = [p.piece for p in parts if p.piece.tokens == p.piece.length and not p.cut]
        assert shown.count("whole, ") == len(whole)
        assert all(f"whole, {piece.tokens:,} tokens" in shown for piece in whole)
        later = [p.piece for p in parts if p.piece.offset]
        assert shown.count("begins in another row") == len(later)
        found += [*whole, *later]
    assert {bool(piece.offset) for piece in found} == {True, False}, "both have to be there for this to say anything"


def test_colours_only_on_a_terminal_that_wants_them(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["data", "show", str(run[0])]) == 0
    assert "\x1b[1;32m" in capsys.readouterr().out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["data", "show", str(run[0])]) == 0
            shown = capsys.readouterr().out
            assert "\x1b" not in shown and "⟦" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "8"], "step 8: pretrain has 8 of them. Fix: give one from 0 to 7"),
        (["--stage", "tunes"], "did you mean `tune`?"),
        (["--split", "test"], "use train or valid"),
        (["--split", "valid", "--step", "99"], "validation of pretrain looks at"),
        (["train.steps=3"], "a run is what it is"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, capsys, words, message):
    assert main(["data", "show", str(run[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_no_run_and_files_that_are_no_page_stay(run, tmp_path, capsys):
    assert main(["data", "show", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    mine = tmp_path / "notes.html"
    mine.write_text("<p>mine</p>")
    assert main(["data", "show", str(run[0]), "--html", str(mine)]) == 2
    assert "stays as it is" in capsys.readouterr().err and mine.read_text() == "<p>mine</p>"


def test_conversations_that_changed_since_are_noticed(run):
    folder, path, _ = run
    recipe = Recipe.load(path)
    assert feed.changed(recipe, folder) == []
    source = path.parent / "long.jsonl"
    before = source.read_text()
    try:
        source.write_text(before.replace("答", "回"))
        assert feed.changed(recipe, folder) == ["the conversations have changed since this run was tuned on them"]
    finally:
        source.write_text(before)


def test_a_stage_that_is_not_there_is_refused(run):
    folder, path, _ = run
    recipe = Recipe.load(path, ["tune=null"])
    assert feed.stages(recipe) == ["pretrain"]
    with pytest.raises(ConfigError, match="has no stage 'tune'"):
        feed.look(recipe, folder, "tune")


def test_the_rows_of_a_stream_end_where_the_next_begin():
    from test_pack import MemoryShards

    packed = StreamRows(MemoryShards([5, 9, 1, 30]), 10, shuffle=False)
    pieces = [packed.pieces(0, row) for row in range(packed.n_rows)]
    assert [tuple(p)[:5] for p in pieces[0]] == [(0, 5, 5, 0, 0), (5, 5, 6, 1, 0)]
    for row, found in enumerate(pieces):
        batch = packed.rows(0, np.array([row]))
        assert sum(p.slots for p in found) == int(batch["valid"].sum())
        assert sum(p.slots < p.tokens for p in found) <= 1
