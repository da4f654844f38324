"""Laws of numbers: what is predicted from the configuration is what is there."""

from __future__ import annotations

import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from octavo.laws.reading import with_backend
from octavo.laws.result import require
from octavo.laws.subject import N_SOURCE, Subject
from octavo.models.cost import cost, predicted_parameters
from octavo.models.decoder import build


def config(subject: Subject) -> None:
    """Written as JSON and read back, the configuration is equal and builds the same parameters."""
    own = subject.config
    text = json.dumps(own.model_dump(mode="json"))
    again = type(own).model_validate(json.loads(text))
    require(again == own, f"read back as {again}")
    require(json.dumps(again.model_dump(mode="json")) == text, "written again it differs")
    shapes = [{name: tuple(p.shape) for name, p in build(c, device="meta").named_parameters()} for c in (own, again)]
    require(shapes[0] == shapes[1], "read back it builds other parameters")


def parameters(subject: Subject) -> None:
    """The formula gives the count, tied weights once, also for a model without storage."""
    counted = sum(p.numel() for p in subject.model.parameters())
    on_meta = build(subject.config, device="meta")
    for name, found in {
        "predicted": predicted_parameters(subject.model),
        "on the meta device": cost(on_meta).parameters,
        "by mixer": counted
        - sum(p.numel() for m in subject.model.mixers().values() for p in m.parameters())
        + sum(m.predicted_parameters() for m in subject.model.mixers().values()),
    }.items():
        require(found == counted, f"{name}: {found}, counted {counted}")


def flops(subject: Subject) -> None:
    """Predicted FLOPs equal torch.utils.flop_counter's on the plain backend.

    The convention: matrix products of a forward pass, two for a multiply-add, the head included, attention
    over the full square (a causal mask hides scores that are computed all the same); no look-ups, norms,
    activations, softmax.
    """
    model = subject.fresh(with_backend(subject.config, "plain"))
    T = subject.n_tokens
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(subject.inputs(subject.tokens(1)))
    predicted, counted = cost(model, T, n_source=N_SOURCE).forward_flops, counter.get_total_flops()
    require(predicted == counted, f"predicted {predicted}, counted {counted}")


def state_bytes(subject: Subject) -> None:
    """A state holds the bytes that the specs say, spare entries and bookkeeping left out."""
    for rows, n in ((1, subject.n_tokens), (3, 5)):
        held = subject.model.new_state(rows, n)
        subject.logits(subject.tokens(rows, 1), held) if subject.model.capabilities.incremental else None
        predicted = rows * cost(subject.model, n, torch.float64, N_SOURCE).state_bytes
        require(
            held.payload_bytes == predicted, f"{rows} rows of {n}: {predicted} predicted, {held.payload_bytes} held"
        )
        require(held.n_bytes >= held.payload_bytes, f"{held.n_bytes} bytes held are less than their payload")
