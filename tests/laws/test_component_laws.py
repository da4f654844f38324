"""Every law on every norm, position scheme, rope scaling and reader of the tables, and the verdict on components.

Mixers are in test_models.py, which puts them to every use as well.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from octavo import laws
from octavo.cli.main import main
from octavo.laws.components import TABLES, Size, components, find, required
from octavo.laws.examine import HEADINGS, cells, examine
from octavo.laws.parity import Parity, collect, from_json, from_lines, to_json
from octavo.nn.contracts import full_precision
from octavo.nn.norm import Norm
from octavo.nn.position import Positions
from octavo.schema import Config

OTHERS = [c.name for c in components() if not {"mixer", "channel", "activation"} & set(c.tables)]


@pytest.mark.parametrize("name", OTHERS)
def test_every_part_that_is_no_mixer_keeps_every_law(name):
    results = laws.check_component(name)
    assert len(results) >= 2
    for use, found in results.items():
        assert not [str(result) for result in found if not result.ok], use


def test_every_value_of_every_table_is_a_component_with_a_name_of_its_own():
    found = components()
    assert len({c.name for c in found}) == len(found) == sum(len(table.entries) for table in TABLES.values())
    assert {"norm-none", "position-none", "attention", "window"} <= {c.name for c in found}
    assert find("norm-none").tables == ("norm",)


def test_every_component_can_be_built_from_its_settings():
    for component in components():
        if hasattr(component.cls, "Config"):
            config = component.cls.Config.model_validate(component.settings())
            assert config.kind == component.kind


class Floor(Norm):
    """``max(x, c) w``: not much of a norm, and somebody's own."""

    class Config(Config):
        kind: Literal["own_parts:Floor"] = "own_parts:Floor"
        c: float

    def __init__(self, config: Floor.Config, d: int):
        super().__init__()
        self.d, self.c = d, config.c
        self.weight = nn.Parameter(torch.ones(d))

    def predicted_parameters(self) -> int:
        return self.d

    def forward(self, x: Tensor) -> Tensor:
        return full_precision(x).clamp(min=-self.c) * self.weight


class Ramp(Positions):
    """``x + position / 100``: a position scheme of one's own."""

    class Config(Config):
        kind: Literal["own_parts:Ramp"] = "own_parts:Ramp"

    def __init__(self, config: Ramp.Config, dims):
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + positions[..., None].to(x.dtype) / 100


class Shrinking(Ramp):
    """The mistake: what is added depends on the length of the text."""

    class Config(Config):
        kind: Literal["own_parts:Shrinking"] = "own_parts:Shrinking"

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + positions[..., None].to(x.dtype) / positions.shape[1]


@pytest.fixture(autouse=True)
def own_parts(monkeypatch):
    module = types.ModuleType("own_parts")
    module.Floor, module.Ramp, module.Shrinking = Floor, Ramp, Shrinking
    module.nothing = 5
    monkeypatch.setitem(sys.modules, "own_parts", module)


def test_a_norm_and_a_position_scheme_of_ones_own_need_no_fork():
    for kind, table in (("own_parts:Floor", "norm"), ("own_parts:Ramp", "position")):
        component = find(kind)
        assert component.own and component.tables == (table,)
        verdict = examine(component)
        assert verdict.standing == "keeps the laws", verdict.broken
        assert len(verdict.kept) == len(verdict.asked) >= 14
    assert find("own_parts:Floor").settings()["c"] == 2.0


def test_what_is_broken_is_said_and_is_unproven():
    verdict = examine(find("own_parts:Shrinking"), [Parity("somebody", 1, fp32=0.0)])
    assert verdict.standing == "unproven"
    broken = {result.law for _, result in verdict.broken}
    assert {"packed", "padding", "incremental"} <= broken
    assert not broken & set(verdict.kept)
    assert broken | set(verdict.kept) == set(verdict.asked)
    row = dict(zip(HEADINGS, cells(verdict)))
    assert row["laws"] == f"{len(verdict.kept)} of {len(verdict.asked)}"
    assert (row["reference"], row["max error fp32"], row["max error bf16"]) == ("somebody", "0", "")


def test_a_component_that_cannot_be_built_is_unproven(monkeypatch):
    def fails(self, config, dims):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Ramp, "__init__", fails)
    verdict = examine(find("own_parts:Ramp"))
    assert verdict.standing == "unproven"
    assert {result.law for _, result in verdict.broken} == {"build"}
    assert "no such thing" in verdict.broken[0][1].detail


def test_standing_needs_laws_and_parity():
    verdict = examine(find("identity"))
    assert verdict.standing == "keeps the laws"
    assert dataclasses.replace(verdict, parity=[Parity("somebody", 1, fp32=1e-7)]).standing == "proven"
    assert dataclasses.replace(verdict, results={}).standing == "unproven"


@pytest.mark.parametrize(("name", "said"), [("own_parts:nothing", "derived from"), ("own_parts:None", "cannot import")])
def test_what_is_no_component_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        find(name)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(LookupError, match="attention"):
        find("atention")


def test_settings_without_a_default_get_values():
    from pydantic import Field

    class Settings(Config):
        kind: Literal["x"] = "x"
        window: int
        size: int
        factor: float
        share: float
        short: tuple[float, ...]
        chosen: int = Field(examples=[7])
        rest: int = 3

    assert required(Settings, Size(d_model=32, n_heads=4)) == {
        "window": 5, "size": 4, "factor": 4.0, "share": 2.0, "short": [1.0, 1.5, 2.0, 2.5], "chosen": 7,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ the verb


def test_the_verb_prints_a_table_and_leaves_with_0(capsys):
    assert main(["verify", "gelu", "own_parts:Ramp"]) == 0
    head, gelu, own, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "component"
    assert gelu.startswith("gelu") and gelu.endswith("proven")
    assert own.endswith("keeps the laws")
    assert last == "1 proven, 1 keep the laws, 0 unproven"


def test_the_verb_leaves_with_1_and_names_use_and_law(capsys):
    assert main(["verify", "own_parts:Shrinking"]) == 1
    out = capsys.readouterr().out
    assert "own_parts:Shrinking, grouped heads: packed: broken" in out
    assert out.endswith("1 unproven\n")


def test_the_verb_as_json_with_parity_of_ones_own(tmp_path, capsys):
    lines = tmp_path / "parity.jsonl"
    line = {"kind": "own_parts:Ramp", "reference": "by hand", "case": "", "dtype": "fp32", "error": 1.23e-7, "test": ""}
    lines.write_text(json.dumps(line) + "\n")
    assert main(["verify", "own_parts:Ramp", "--json", "--parity", str(lines)]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["standing"], one["references"], one["max_error"]["fp32"]) == ("proven", ["by hand"], 1.2e-7)
    assert one["laws_passed"] == one["laws_asked"] >= 14


def test_the_verb_refuses_unknown_names_and_files(tmp_path, capsys):
    assert main(["verify", "atention"]) == 2
    assert "did you mean `attention`?" in capsys.readouterr().err
    assert main(["verify", "no_such_module:Thing"]) == 2
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n")
    assert main(["verify", "gelu", "--parity", str(wrong)]) == 3


def test_a_class_in_the_present_folder_is_found(tmp_path, monkeypatch, capsys):
    from pathlib import Path

    source = (Path(__file__).parent / "example_mixer.py").read_text("utf-8").replace("example_mixer:", "here_mixer:")
    (tmp_path / "here_mixer.py").write_text(source, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert main(["verify", "here_mixer:Gru"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("here_mixer:Gru") and "token mixer or" in row and row.endswith("keeps the laws")
    monkeypatch.delitem(sys.modules, "here_mixer")


# ---------------------------------------------------------------------------------------- the record


def test_records_are_the_largest_errors_by_reference_and_survive_being_written():
    def line(reference, dtype, error, test="tests/parity/test_a.py"):
        return json.dumps(
            {"kind": "a", "reference": reference, "case": "", "dtype": dtype, "error": error, "test": test}
        )

    records = collect([line("one", "fp32", 1e-7), line("one", "fp32", 3.14159e-7), line("one", "bf16", 0.004), "",
                       line("another", "fp64", 0.0, "")])  # fmt: skip
    assert records == {
        "a": [
            Parity("another", 1, fp64=0.0),
            Parity("one", 3, fp32=3.1e-7, bf16=0.004, tests=("tests/parity/test_a.py",)),
        ]
    }
    assert from_json(json.loads(json.dumps(to_json(records)))) == records


def test_lines_of_another_form_are_refused(tmp_path):
    (tmp_path / "x").write_text("[1]\n")
    with pytest.raises(ValueError, match="no lines of parity tests"):
        from_lines(tmp_path / "x")
