"""Recurrent networks: the simple one, LSTM and GRU, in one or in both directions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.nn.through_time import GruSteps, Network, SimpleSteps, through_time
from octavo.schema import Config

Hidden = tuple[Tensor, ...]


class RecurrentConfig(Config):
    """What every recurrent mixer can be.

    both: read backwards too, in a model with ``causal: false``, and lay the two results side by side or add them.
    """

    width: int | None = Field(default=None, ge=1, description="of the hidden state; default: d_model")
    both: Literal["concat", "sum"] | None = Field(default=None, description="read backwards too")
    backend: Literal["auto", "plain"] = "auto"


class Cell(nn.Module):
    """One direction. As torch.nn names them ``up`` is weight_ih and bias_ih, ``over`` is weight_hh and bias_hh."""

    def __init__(self, d_model: int, width: int, gates: int):
        super().__init__()
        self.up = Projection(d_model, gates * width, "up", bias=True)
        self.over = Projection(width, gates * width, "recurrent", bias=True)

    def weights(self) -> list[Tensor]:
        """In the order of torch's kernels."""
        return [self.up.weight, self.over.weight, self.up.bias, self.over.bias]  # type: ignore[list-item]


class _Documents(NamedTuple):
    """The pieces of documents in a pass, n of them, in the order of their rows; M valid tokens.

    begins (n,): the first token's place among all B T. lengths (n,). row (n,). goes_on (n,): a state's document goes
    on. valid (B, T). member (M,): which piece a token belongs to. at (M,): its place in that.
    """

    begins: Tensor
    lengths: Tensor
    row: Tensor
    goes_on: Tensor
    valid: Tensor
    member: Tensor
    at: Tensor

    @classmethod
    def of(cls, ctx: Context) -> _Documents:
        """Read off the context; how many there are is only known to the eye, so this cannot be compiled."""
        B, T = ctx.starts.shape
        order = torch.arange(T, device=ctx.starts.device)
        first = torch.where(ctx.starts, order, 0).cummax(1).values
        named = (first + T * torch.arange(B, device=order.device)[:, None])[ctx.valid]
        begins, member, lengths = named.unique(return_inverse=True, return_counts=True)
        row, begin = begins // T, begins % T
        goes_on = (begin == 0) & ~ctx.starts[row, begin]
        return cls(begins, lengths, row, goes_on, ctx.valid, member, (order - first)[ctx.valid])


class Recurrent(Mixer):
    """What the three have in common: directions, documents, padding, and how the steps are run.

    ``plain`` goes step by step. ``auto`` uses torch's fused kernels, or on the CPU ``through_time`` where that is
    quicker: over whole rows as they are, over documents as rows of about one length; and with a state torch's, on the
    packed sequences of torch.nn.utils.rnn. Single steps, compiled passes over documents and an activation that torch
    has no kernel for go step by step where neither serves.
    """

    gates: ClassVar[int]
    fields: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(self, config: Any, dims: Dims):
        super().__init__()
        self.config, self.width = config, config.width or dims.d_model
        self.there = Cell(dims.d_model, self.width, self.gates)
        self.back = Cell(dims.d_model, self.width, self.gates) if config.both else None
        wide = 2 * self.width if config.both == "concat" else self.width
        self.o = Projection(wide, dims.d_model, "o")
        ahead = config.both is not None
        self.capabilities = Capabilities(  # type: ignore[misc]
            causal=not ahead, incremental=not ahead, constant_state=not ahead
        )

    @abstractmethod
    def step(self, inner: Tensor, over: Projection, hidden: Hidden) -> Hidden:
        """One token: its share of the gates (B, gates H) and the hidden state before to the state after."""

    @abstractmethod
    def kernel(self) -> Any:
        """torch's fused kernel, or None where there is none."""

    def network(self) -> Network | None:
        """What ``through_time`` runs quicker than that kernel on a CPU, if it does."""
        return None

    def state_spec(self) -> StateSpec:
        if self.back is not None:
            return {}
        # In the compute dtype: a hidden state is an output as well, rounded to it at every step in any case.
        return {name: StateField("row", (self.width,)) for name in self.fields}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        hidden = None if state is None else tuple(state.read(name) for name in self.fields)
        y, hidden = self._run(self.there, x, ctx, hidden)
        if state is not None:
            state.write(**dict(zip(self.fields, hidden, strict=True)))
        if self.back is not None:
            turned = _turned(ctx)[..., None]
            back = self._run(self.back, x.gather(1, turned.expand_as(x)), ctx, None)[0]
            back = back.gather(1, turned.expand_as(back))
            y = y + back if self.config.both == "sum" else torch.cat([y, back], -1)
        return self.o(y), {}

    def _run(self, cell: Cell, x: Tensor, ctx: Context, hidden: Hidden | None) -> tuple[Tensor, Hidden]:
        """One direction over x (B, T, D): y (B, T, H) and the hidden state after each row's last valid token."""
        fresh, one = hidden is None, x.shape[1] == 1
        if hidden is None:
            hidden = tuple(x.new_zeros(len(x), self.width) for _ in self.fields)
        fused = None if self.config.backend == "plain" or (one and not fresh) else self.kernel()
        rows = self._rows(fused, cell, x) if fresh else None
        # Tensors without data have no documents to be seen: whole rows take as much memory.
        if rows is not None and (not ctx.restarts or x.is_meta):
            return rows(x), hidden  # the last state is of no use without one to keep
        if rows is not None and not torch.compiler.is_compiling():
            return self._in_lengths(rows, x, _Documents.of(ctx)), hidden
        if not fresh and fused is not None and not torch.compiler.is_compiling():
            return self._as_sequences(fused, cell, x, _Documents.of(ctx), hidden)
        ys = []
        for t, inner in enumerate(cell.up(x).unbind(1)):
            start, valid = ctx.starts[:, t, None], ctx.valid[:, t, None]
            new = self.step(inner, cell.over, tuple(torch.where(start, 0.0, h) for h in hidden))
            hidden = tuple(torch.where(valid, n, h) for n, h in zip(new, hidden, strict=True))
            ys.append(torch.where(valid, hidden[0], 0.0))
        return torch.stack(ys, 1), hidden

    def _rows(self, fused: Any, cell: Cell, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What takes whole rows that begin at nothing, (N, T, D), to their hidden states (N, T, H)."""
        network, weights = self.network(), cell.weights()
        here = x.is_meta or (x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"))
        if network is not None and here and self.config.backend == "auto" and not torch.compiler.is_compiling():
            return lambda rows: through_time(network, rows, weights)
        if fused is None:
            return None

        def run(rows: Tensor) -> Tensor:
            start = [rows.new_zeros(1, len(rows), self.width) for _ in self.fields]
            return fused(rows, _one_or_all(start), weights, True, 1, 0.0, self.training, False, True)[0]

        return run

    def _in_lengths(self, run: Callable[[Tensor], Tensor], x: Tensor, documents: _Documents) -> Tensor:
        """Every document begins at nothing: those of about one length are rows of a batch, padded at the end."""
        flat, lengths = x.flatten(0, 1), documents.lengths
        y = flat.new_zeros(len(flat), self.width)
        classes = (lengths - 1).float().log2().ceil().long()  # up to 1, 2, 4, 8, ... tokens
        for one in classes.unique():
            begins, n = documents.begins[classes == one], lengths[classes == one]
            order = torch.arange(int(n.max()), device=x.device)
            at, own = begins[:, None] + order, order < n[:, None]
            out = run(flat[at.clamp(max=len(flat) - 1)])
            y = y.index_put((at[own],), out[own])
        return y.view(*x.shape[:2], -1)

    def _as_sequences(
        self, fused: Any, cell: Cell, x: Tensor, documents: _Documents, hidden: Hidden
    ) -> tuple[Tensor, Hidden]:
        """Each document is one sequence of a packed batch, as torch.nn.utils.rnn packs them, with its own state."""
        row, member, lengths = documents.row, documents.member, documents.lengths
        if not len(row):
            return x.new_zeros(*x.shape[:2], self.width), hidden
        longest_first = lengths.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        place = (documents.at * len(row) + rank[member]).argsort()
        start = [torch.where(documents.goes_on[:, None], h[row], 0.0)[longest_first][None] for h in hidden]
        steps = documents.at.bincount().cpu()
        data = x[documents.valid][place]
        out, *after = fused(data, steps, _one_or_all(start), cell.weights(), True, 1, 0.0, self.training, False)
        y = x.new_zeros(*x.shape[:2], self.width)
        y[documents.valid] = out[place.argsort()]
        last = row != F.pad(row[1:], (0, 1), value=-1)  # sequences stand in the order of their rows
        ends = tuple(h.index_copy(0, row[last], a[0][rank][last]) for h, a in zip(hidden, after, strict=True))
        return y, ends

    def _products(self) -> list[Projection]:
        cells = [cell for cell in (self.there, self.back) if cell is not None]
        return [p for cell in cells for p in (cell.up, cell.over)] + [self.o]

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * sum(p.d_in * p.d_out for p in self._products())

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in self._products())


def _one_or_all(hidden: list[Tensor]) -> Any:
    """As torch's kernels want it: one tensor, or a list of several."""
    return hidden[0] if len(hidden) == 1 else hidden


def _turned(ctx: Context) -> Tensor:
    """For each token the one that stands in its place when every document is read backwards, (B, T)."""
    T = ctx.starts.shape[1]
    order = torch.arange(T, device=ctx.starts.device)
    first = torch.where(ctx.starts, order, 0).cummax(1).values
    follows = ctx.valid & F.pad(ctx.valid[:, 1:] & ~ctx.starts[:, 1:], (0, 1))
    ends = torch.where(follows, T, order).flip(1).cummin(1).values.flip(1)
    return torch.where(ctx.valid, first + ends - order, order)


class Rnn(Recurrent):
    """``h_t = act(V x_t + U h_{t-1} + b)``, output ``o(h_t)``: the simple recurrent network (Elman 1990).

    With tanh or relu it is torch.nn.RNN, which has two biases; the note's sigma is ``sigmoid``. With ``both``, a
    second one reads each document from its end (Schuster and Paliwal 1997).
    """

    gates = 1

    class Config(RecurrentConfig):
        kind: Literal["rnn"] = "rnn"
        activation: Literal["tanh", "relu", "sigmoid"] = "tanh"

    def step(self, inner: Tensor, over: Projection, hidden: Hidden) -> Hidden:
        return (getattr(torch, self.config.activation)(inner + over(hidden[0])),)

    def network(self) -> Network:
        return SimpleSteps(self.config.activation)

    def kernel(self) -> Any:
        return {"tanh": torch._VF.rnn_tanh, "relu": torch._VF.rnn_relu}.get(self.config.activation)  # type: ignore[attr-defined]


class Lstm(Recurrent):
    """``c_t = f c_{t-1} + i g``, ``h_t = o tanh(c_t)``, gates ``i, f, g, o`` of x_t and h_{t-1}; output ``o(h_t)``.

    Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as torch.nn.LSTM (gates in that order).
    With ``both``, a second one reads each document from its end.
    """

    gates = 4
    fields = ("h", "c")

    class Config(RecurrentConfig):
        kind: Literal["lstm"] = "lstm"

    def step(self, inner: Tensor, over: Projection, hidden: Hidden) -> Hidden:
        h, c = hidden
        i, f, g, o = (inner + over(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def kernel(self) -> Any:
        return torch._VF.lstm  # type: ignore[attr-defined]


class Gru(Recurrent):
    """``h_t = (1 - z) n + z h_{t-1}``, ``n = tanh(W x_t + b + r (U h_{t-1} + c))``, gates ``r, z``; output ``o(h_t)``.

    Cho et al. 2014 with the reset gate after the product, as torch.nn.GRU (gates in the order r, z, n). With
    ``both``, a second one reads each document from its end.
    """

    gates = 3

    class Config(RecurrentConfig):
        kind: Literal["gru"] = "gru"

    def step(self, inner: Tensor, over: Projection, hidden: Hidden) -> Hidden:
        (h,) = hidden
        ir, iz, inn = inner.chunk(3, -1)
        hr, hz, hn = over(h).chunk(3, -1)
        z = (iz + hz).sigmoid()
        return ((1 - z) * (inn + (ir + hr).sigmoid() * hn).tanh() + z * h,)

    def network(self) -> Network:
        return GruSteps()

    def kernel(self) -> Any:
        return torch._VF.gru  # type: ignore[attr-defined]
