"""Configuration objects: immutable, strict, and unions chosen by ``kind``."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from octavo.schema import Config, component, load_object, one_of


class Square:
    class Config(Config):
        kind: Literal["square"] = "square"
        side: int = Field(default=1, gt=0)


class Circle:
    class Config(Config):
        kind: Literal["circle"] = "circle"
        radius: float = 1.0


class Own:
    class Config(Config):
        kind: str
        depth: int


SHAPES = {"square": Square, "circle": Circle}


class Drawing(Config):
    shape: one_of(SHAPES) = {"kind": "square"}  # noqa: RUF012 - pydantic copies defaults
    frame: one_of(SHAPES, "circle") = "circle"


class Strict(Config):
    steps: int = 3
    name: str = "a"


def test_fields_cannot_be_assigned_and_unknown_keys_are_refused():
    config = Strict()
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 4
    with pytest.raises(ValidationError, match="step"):
        Strict(step=4)
    with pytest.raises(ValidationError, match="steps"):
        Strict(steps="many")


def test_defaults_are_validated_too():
    class Wrong(Config):
        steps: int = "many"

    with pytest.raises(ValidationError, match="steps"):
        Wrong()


def test_kind_chooses_the_configuration_and_its_keys():
    drawing = Drawing.model_validate({"shape": {"kind": "circle", "radius": 2}})
    assert drawing.shape == Circle.Config(radius=2.0)
    assert Drawing().shape == Square.Config()
    assert Drawing.model_validate({"shape": "circle"}).shape == Circle.Config()
    ready = Square.Config(side=5)
    assert Drawing(shape=ready).shape is ready


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"kind": "circle", "side": 2}, "side"),  # a key of another kind
        ({"kind": "square", "side": 0}, "side"),
        ({"kind": "sqare"}, "square"),  # the known kinds are in the message
        ({"side": 2}, "kind"),  # no default kind here
        (7, "shape"),
    ],
)
def test_a_wrong_choice_is_refused_by_name(shape, named):
    with pytest.raises(ValidationError, match=named):
        Drawing.model_validate({"shape": shape})


def test_kind_may_be_left_out_where_there_is_a_default():
    assert Drawing.model_validate({"frame": {"radius": 3}}).frame == Circle.Config(radius=3.0)
    assert Drawing.model_validate({"frame": {"kind": "square"}}).frame == Square.Config()


def test_everything_round_trips_through_plain_data():
    drawing = Drawing.model_validate({"shape": {"kind": "square", "side": 4}, "frame": "circle"})
    data = drawing.model_dump()
    assert data == {"shape": {"kind": "square", "side": 4}, "frame": {"kind": "circle", "radius": 1.0}}
    assert Drawing.model_validate(data) == drawing
    assert Drawing.model_validate_json(drawing.model_dump_json()) == drawing


def test_json_schema_lists_the_kinds():
    schema = Drawing.model_json_schema()
    assert set(schema["properties"]["shape"]["discriminator"]["mapping"]) == set(SHAPES)
    assert schema["additionalProperties"] is False


def test_own_component_is_named_by_module_and_class():
    kind = f"{__name__}:Own"
    drawing = Drawing.model_validate({"shape": {"kind": kind, "depth": 2}})
    assert drawing.shape == Own.Config(kind=kind, depth=2)
    assert drawing.model_dump()["shape"] == {"kind": kind, "depth": 2}
    assert component(SHAPES, kind) is Own
    assert component(SHAPES, "circle") is Circle
    with pytest.raises(ValidationError, match="depth"):
        Drawing.model_validate({"shape": {"kind": kind}})


@pytest.mark.parametrize("path", ["no_such_module_here:X", "json:NoSuchName"])
def test_what_cannot_be_imported_is_named(path):
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        load_object(path)
    with pytest.raises(ValidationError, match="cannot import"):
        Drawing.model_validate({"shape": {"kind": path}})


def test_table_of_one_component_needs_no_discriminator():
    class Single(Config):
        shape: one_of({"square": Square}) = "square"

    assert Single.model_validate({"shape": {"side": 3}}).shape == Square.Config(side=3)
