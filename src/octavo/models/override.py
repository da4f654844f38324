"""What may be changed on a trained model without touching a weight: how its rotary positions reach longer texts."""

from __future__ import annotations

from typing import Literal

from octavo.errors import UnsupportedError
from octavo.models.decoder import Decoder, build
from octavo.models.heads import ClassesConfig, Pooling, Problem, TransformConfig
from octavo.nn.rope import RotaryPositions
from octavo.schema import Config


def carried_over(model: Decoder, config: Decoder.Config, *, seed: int = 0) -> Decoder:
    """A model of ``config`` with the weights of ``model``; only its head of classes begins anew where that is other.

    Raises:
        UnsupportedError: ``config`` has weights beyond the head of classes that ``model`` has not.
    """
    made, given = build(config, seed=seed).to(model.embed.weight.dtype), model.state_dict()
    own = made.state_dict()
    if model.config.classes != config.classes:
        given = {name: tensor for name, tensor in given.items() if not name.startswith("classes.")}
    if missing := [name for name in own if name not in given and not name.startswith("classes.")]:
        raise UnsupportedError(f"the model has no weights {', '.join(missing[:3])}", fix="use the same architecture")
    made.load_state_dict({name: given.get(name, tensor) for name, tensor in own.items()})
    return made


def with_classes(config: Decoder.Config, classes: ClassesConfig) -> Decoder.Config:
    """``config`` with a head of classes; the language model's own weights before its logits are left out.

    So do the families that have such heads; a decoder's logits are then those of its embedding, and of no use.
    """
    bare: dict[str, object] = {"head_transform": None, "head_bias": config.head_bias and not config.tie_embeddings}
    if config.causal:
        bare = {"tie_embeddings": True, "head_bias": False}
    return type(config).model_validate(config.model_copy(update={**bare, "classes": classes}).model_dump())


def head_for(
    config: Decoder.Config,
    names: tuple[str, ...],
    problem: Problem,
    pooling: Pooling | None = None,
    *,
    over: Literal["sequence", "token"] = "sequence",
) -> ClassesConfig:
    """A head for these classes: the one that ``config`` has, if it is of the same; else the usual one for such a model.

    A decoder's is one product on its last token, an encoder's BERT's: its first token through a layer with tanh. Over
    tokens it is one product with a bias on either.
    """
    own = config.classes
    same = own is not None and own.over == over and own.n == len(names) and (own.labels or names) == names
    if own is not None and same and own.problem == problem and pooling in (None, own.pooling):
        return own.model_copy(update={"labels": names, "n_classes": None})
    if over == "token":
        return ClassesConfig(labels=names, over="token", dropout=0.1)
    if config.causal:
        return ClassesConfig(labels=names, pooling=pooling or "last", bias=False, problem=problem)
    pooler = TransformConfig(activation="tanh", norm=False)
    return ClassesConfig(labels=names, pooling=pooling or "first", transform=pooler, dropout=0.1, problem=problem)


def set_rope_scaling(model: Decoder, scaling: Config | None) -> None:
    """Let ``model`` turn by other frequencies from now on; None: by those without any scaling.

    Args:
        model: with rotary positions. Its configuration says the new scaling too, so that it is saved with it.
            Blocks that have positions of their own keep them.
        scaling: the ``Config`` of one of ROPE_SCALINGS (nn/rope_scaling.py). Where it says no ``original``, the
            model's max_seq_len is meant, which stays as it is: rotary tables do not end.

    States made before do not fit.

    Raises:
        UnsupportedError: the model has other positions, or the scaling does not fit its heads.
    """
    positions = model.config.positions
    if not isinstance(positions, RotaryPositions.Config):
        raise UnsupportedError(
            f"the model has positions {positions.kind}, nothing turns in it", fix="use a model with positions rope"
        )
    changed = positions.model_copy(update={"scaling": scaling})
    for dims in model.config.position_dims() if model.config.heads(positions) else ():
        try:
            changed.check(dims.head_dim)
        except ValueError as error:
            raise UnsupportedError(str(error), fix="use another scaling") from None
    model.config = model.config.model_copy(update={"positions": changed})
    model.use_positions(model.config)
