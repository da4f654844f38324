"""Laws of one pass over text: who may depend on whom, and that nothing is idle or random."""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor

from octavo.laws.result import require, require_close
from octavo.laws.subject import Subject
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.schema import Config


def causal(subject: Subject) -> None:
    """The gradient of an output with respect to every later token's embedding is exactly zero.

    Asked of whole rows, and of rows said to be one document, where a mask stands for the flag.
    """
    one_document = {"doc_ids": torch.zeros(2, subject.n_tokens, dtype=torch.long)}
    _causal(subject, {}, "")
    if subject.model.capabilities.packed:
        _causal(subject, one_document, ", with a mask")


def _causal(subject: Subject, named: dict[str, Any], said: str) -> None:
    model, T = subject.model, subject.n_tokens
    leaves: list[Tensor] = []

    def replace(module: object, args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())  # an encoder's embedding comes before the text's own
        return leaves[-1]

    hook = model.embed.register_forward_hook(replace)
    try:
        logits = model(subject.inputs(subject.tokens(2), **named)).logits
    finally:
        hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    for t in (0, 1, T // 2, T - 2):
        (gradient,) = torch.autograd.grad((logits * weights)[:, t].sum(), leaves[-1], retain_graph=True)
        later = gradient[:, t + 1 :].abs().amax((0, 2))
        require(
            bool((later == 0).all()), f"the output at token {t} depends on token {t + 1 + int(later.argmax())}{said}"
        )
        require(bool((gradient[:, t] != 0).any()), f"the output at token {t} does not depend on that token{said}")


def packed(subject: Subject) -> None:
    """Documents that share a row give what each gives alone; padding between them changes nothing."""
    T = subject.n_tokens
    tokens = subject.tokens(2)
    doc_ids = torch.stack([torch.arange(T) * 3 // T, 5 + (torch.arange(T) >= 2)])
    starts = [[t for t in range(T) if t == 0 or row[t] != row[t - 1]] + [T] for row in doc_ids]
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in zip(s, s[1:])]) for s in starts])
    together = subject.logits(tokens, doc_ids=doc_ids)
    with_positions = subject.logits(tokens, doc_ids=doc_ids, positions=positions)
    require_close(with_positions, together, "positions counted from each document's start")
    valid = torch.ones(2, T + 2, dtype=torch.bool)
    valid[:, [1, T + 1]] = False
    padded_ids = torch.full((2, T + 2), -1)
    padded_ids[valid] = doc_ids.flatten()
    padded_tokens = subject.tokens(2, T + 2, seed=1)
    padded_tokens[valid] = tokens.flatten()
    with_padding = subject.logits(padded_tokens, doc_ids=padded_ids, valid=valid)[valid].view_as(together)
    require_close(with_padding, together, "packed with padding between")
    for row, cuts in enumerate(starts):
        for a, b in zip(cuts, cuts[1:]):
            alone = subject.logits(tokens[row : row + 1, a:b])
            require_close(together[row : row + 1, a:b], alone, f"row {row}, document at {a}")


def padding(subject: Subject) -> None:
    """Rows padded left, right and in the middle equal the rows without padding; the padding's ids are random."""
    T, rows = subject.n_tokens, 4
    n = torch.tensor([T, T - 4, T - 4, T - 5])
    order = torch.arange(T)
    valid = torch.stack([order >= 0, order >= 4, order < n[2], (order < 2) | (order >= 7)])
    tokens = subject.tokens(rows)
    if subject.model.capabilities.batch_independent:
        out = subject.logits(tokens, valid=valid)
    else:
        out = torch.cat([subject.logits(tokens[row : row + 1], valid=valid[row : row + 1]) for row in range(rows)])
    for row in range(rows):
        alone = subject.logits(tokens[row : row + 1, valid[row]])
        name = ("none", "left", "right", "middle")[row]
        require_close(out[row : row + 1, valid[row]], alone, f"padding: {name}")


def rows(subject: Subject) -> None:
    """Rows of a batch do not see each other, in any order."""
    tokens = subject.tokens(4)
    out = subject.logits(tokens)
    for row in range(4):
        require_close(subject.logits(tokens[row : row + 1]), out[row : row + 1], f"row {row} alone")
    require_close(subject.logits(tokens.flip(0)), out.flip(0), "rows in reverse")


def gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient that is not all zero, and it is the derivative of the loss."""
    model, tokens = subject.fresh(), subject.tokens(3)

    def loss() -> Tensor:
        further = ("classes",) if getattr(model, "classes", None) is not None else ()
        outputs = model(
            subject.inputs(tokens[:, :-1], **typed(model, tokens[:, :-1])), needs=("logits", "multi_token", *further)
        )
        ce = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        squares = [h.square() for h in (*outputs.multi_token, *([outputs.classes] if further else ()))]
        return ce + sum(value.sum() for value in (*outputs.aux.values(), *squares))

    loss().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        require(parameter.grad is not None, f"{name} gets no gradient")
        gradient = typing.cast(Tensor, parameter.grad)
        require(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")
        require(bool((gradient != 0).any()), f"the gradient of {name} is all zero")

    def slope(along: dict[str, Tensor], step: float) -> Tensor:
        """The central difference of the loss in a direction."""
        sides = []
        for sign in (1, -2, 1):  # forward, back past the start, and home
            for name, direction in along.items():
                trained[name].add_(direction, alpha=sign * step)
            sides.append(loss())
        return (sides[0] - sides[1]) / (2 * step)

    generator = torch.Generator().manual_seed(5)
    directions = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trained.items()}
    with torch.no_grad():
        parts = {n: (typing.cast(Tensor, trained[n].grad) * d).sum() for n, d in directions.items()}
        predicted, seen = float(torch.stack(list(parts.values())).sum()), float(slope(directions, 1e-6))
        if abs(predicted - seen) > 1e-4 * max(1.0, abs(seen)):
            off = {n: abs(float(slope({n: d}, 1e-6)) - float(parts[n])) for n, d in directions.items()}
            worst = max(off, key=off.__getitem__)
            require(False, f"the gradient is not the derivative of the loss, most of all for {worst}")


def typed(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Token types that use all there are, for a model that has any."""
    n = getattr(model.config, "n_token_types", None)
    return {"token_types": tokens % n} if n else {}


def deterministic(subject: Subject) -> None:
    """The same seed starts with the same weights, another with others; evaluation has no chance in it."""
    one, same, other = (
        torch.cat([p.detach().flatten() for p in build(subject.config, seed=seed).parameters()]) for seed in (3, 3, 4)
    )
    require(torch.equal(one, same), "two builds with one seed differ")
    require(not torch.equal(one, other), "another seed starts with the same weights")
    tokens = subject.tokens(2)
    require(torch.equal(subject.logits(tokens), subject.logits(tokens)), "two evaluations differ")


def hidden_states(subject: Subject) -> None:
    """n_layers + 1 hidden states, the last of them normed and what the head reads."""
    model = subject.model
    with torch.no_grad():
        out = model(subject.inputs(subject.tokens(2)), needs=("logits", "hidden", "hidden_states"))
        n = len(out.hidden_states)
        require(n == model.config.n_layers + 1, f"{n} hidden states of {model.config.n_layers} layers")
        require(torch.equal(out.hidden_states[-1], out.hidden), "the last hidden state is not the normed one")
        require_close(model.logits(out.hidden), out.logits, "the head on the hidden state")


def with_backend(config: Config, backend: str) -> Config:
    """``config`` with every component in it that knows ``backend`` using it."""

    def changed(value: Any) -> Any:
        if isinstance(value, Config):
            new = {name: changed(getattr(value, name)) for name in type(value).model_fields}
            if backend in _names(value):
                new["backend"] = backend
            return value.model_copy(update=new)
        return {name: changed(part) for name, part in value.items()} if isinstance(value, dict) else value

    return changed(config)


def backends(config: Config) -> list[str]:
    """The backends that the components in ``config`` have, the plain one left out."""

    def found(value: Any) -> set[str]:
        parts = [value] if isinstance(value, Config) else []
        names = {name for part in parts for name in _names(part)}
        inner = [getattr(value, name) for name in type(value).model_fields] if parts else []
        inner += value.values() if isinstance(value, dict) else []
        return names.union(*(found(part) for part in inner))

    return sorted(found(config) - {"plain"})


def _names(config: Config) -> tuple[str, ...]:
    """The backends one component has."""
    field = type(config).model_fields.get("backend")
    return typing.get_args(field.annotation) if field is not None else ()


def twins(subject: Subject) -> None:
    """Outputs and every gradient of a fast path equal the plain one's: whole rows, packed, padded, one token."""
    T, tokens = subject.n_tokens, subject.tokens(2)
    doc_ids = torch.stack([torch.arange(T) * 3 // T, torch.arange(T) // 4])
    valid = torch.stack([torch.arange(T) < T - 2, torch.arange(T) >= 3])
    cases = {
        "whole": subject.inputs(tokens),
        "packed": subject.inputs(tokens, doc_ids=doc_ids),
        "padded": subject.inputs(tokens, valid=valid),
        "one token": subject.inputs(tokens[:, :1], valid=torch.ones(2, 1, dtype=torch.bool)),
    }
    if not subject.model.capabilities.packed:
        del cases["packed"]

    def run(model: Decoder, inputs: Inputs) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(inputs).logits
        logits = logits if inputs.valid is None else logits[inputs.valid]
        logits.square().sum().backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        return logits.detach(), torch.cat([g.flatten() for g in grads])

    for name in backends(subject.config):
        plain, fast = (subject.fresh(with_backend(subject.config, b)) for b in ("plain", name))
        for case, inputs in cases.items():
            wanted, wanted_gradient = run(plain, inputs)
            got, gradient = run(fast, inputs)
            require_close(got, wanted, f"{name} against plain, {case}")
            require_close(gradient, wanted_gradient, f"{name} against plain, {case}, gradients")


def compilable(subject: Subject) -> None:
    """torch.compile traces a whole pass, packed and padded, without a graph break; the result is the same."""
    T, tokens = subject.n_tokens, subject.tokens(2)
    named = {"valid": torch.arange(T).expand(2, T) < T - 1}
    if subject.model.capabilities.packed:
        named["doc_ids"] = torch.arange(T).expand(2, T) // 5
    beside = subject.beside(tokens, doc_ids=named.get("doc_ids"))
    torch.compiler.reset()  # every model comes this way, and only so many may come by one line
    traced = torch.compile(lambda x, n: subject.model(Inputs(x, **n)).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        out = traced(tokens, named | beside)
    require_close(out, subject.logits(tokens, **named), "compiled against eager")
