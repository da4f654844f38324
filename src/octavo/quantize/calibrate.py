"""What each product reads on calibration text, block by block, as the blocks that are already quantised leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.decoder import Decoder
from octavo.nn.contracts import Context, Inputs
from octavo.nn.projection import GroupedProjection, Projection

BATCH_TOKENS = 1024


@dataclass
class Moment:
    """``H = sum x x^T`` over the inputs x of one product: (K, K), or (n, K, K) for n groups."""

    H: Tensor


class _Reached(Exception):
    """The first block has been given its input."""


@torch.no_grad()
def through_blocks(
    model: Decoder, rows: Tensor, wanted: frozenset[str], replace: Callable[[str, Moment | None], None]
) -> None:
    """Call ``replace(name, moment)`` for every wanted product in a block, and for the head, first to last.

    A block is run on what the quantised blocks before it give. Products that read nothing in a forward pass (some
    mixers use their weights directly) are not replaced here.

    Args:
        rows: (N, T) tokens.
    """
    size = min(len(rows), max(1, BATCH_TOKENS // rows.shape[1]))
    batches = list(rows[: len(rows) // size * size].split(size))  # of one shape: they share their contexts
    streams, contexts = _entrances(model, batches)
    for depth, (place, block) in enumerate(zip(model.uses, model.stack(), strict=True)):
        prefix = f"blocks.{place}."
        names = {id(m): n for n, m in block.named_modules(prefix=prefix[:-1]) if n in wanted}
        with _moments(block, names) as moments:
            for x in streams:
                block(x, contexts[depth], None, depth)
        for name, moment in moments.items():
            replace(name, moment)
        streams = [block(x, contexts[depth], None, depth)[0] for x in streams]
    if model.head is not None and "head" in wanted:
        replace("head", _of_head(model, streams))


def _of_head(model: Decoder, streams: list[Tensor]) -> Moment:
    """Of what the head reads, without the product itself: there are as many columns as the vocabulary has words."""
    read: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        read.append(args[0])
        return args[0][..., :0, :]

    assert model.head is not None
    handle = model.head.register_forward_pre_hook(note)
    try:
        for x in streams:
            model.logits(model.norm(x))
    finally:
        handle.remove()
    flat = [x.flatten(0, -2).float() for x in read]
    return Moment(torch.stack([x.T @ x for x in flat]).sum(0))


@contextmanager
def _moments(block: nn.Module, names: dict[int, str]) -> Iterator[dict[str, Moment]]:
    """Inside, what the products of ``block`` read adds up in the dictionary given; those that read the same share."""
    found: dict[str, Moment] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        name, x = names[id(module)], args[0]
        if isinstance(module, GroupedProjection):
            moment = found.setdefault(name, Moment(x.new_zeros(module.n, module.d_in, module.d_in)))
            start = 0
            for group, end in enumerate(args[1].tolist()):
                moment.H[group].addmm_(x[start:end].T, x[start:end])
                start = end
            return
        if not last or last[0][0] is not x:
            flat = x.flatten(0, -2)
            last[:] = [(x, flat.T @ flat)]
        H = last[0][1]
        if name in found:
            found[name].H += H
        else:
            found[name] = Moment(H.clone())

    modules = [m for m in block.modules() if id(m) in names and isinstance(m, Projection | GroupedProjection)]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _entrances(model: Decoder, batches: list[Tensor]) -> tuple[list[Tensor], list[Context]]:
    """What the first block reads of each batch, and the context of every layer, which is the same for all batches."""
    contexts: list[Context] = []
    found: list[Tensor] = []

    def note(block: nn.Module, args: tuple[Any, ...]) -> None:
        contexts.append(args[1])

    def stop(block: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handles = [block.register_forward_pre_hook(note) for block in model.stack()]
    model(Inputs(batches[0]), needs=("hidden",))
    for handle in handles:
        handle.remove()
    handle = model.stack()[0].register_forward_pre_hook(stop)
    try:
        for batch in batches:
            try:
                model(Inputs(batch), needs=("hidden",))
            except _Reached:
                continue
    finally:
        handle.remove()
    return found, contexts
