"""Who runs the model: some tokens of some sequences in, the logits after each one's last token out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.infer import native
from octavo.infer.memory import Pool
from octavo.infer.scheduler import Work
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs, Memory

NATIVE_TOKENS = 16
"""Tokens of a work that the native step reads; longer parts are matrix products, which torch does faster."""


class PassFailed(Exception):
    """The model failed on these works, and only on these."""

    def __init__(self, works: Sequence[Work], cause: Exception):
        super().__init__(str(cause))
        self.works, self.cause = works, cause


class Executor(Protocol):
    """Reads works and writes their tokens' state into the pool.

    ``__call__`` gives every work that was read, in any order, with the logits (n_wanted, V) after its last tokens if it
    ``completes`` its text; it raises PassFailed for those it could not read, and what it gave before holds.
    """

    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]: ...


class PlainExecutor:
    """Any model through its own forward pass: works of equal length together.

    Args:
        memories: what an encoder-decoder reads beside a sequence's own tokens, given with its first.
        deterministic: every work in a pass of its own, so that no sum depends on what else is read.
    """

    def __init__(
        self,
        model: Any,
        pool: Pool,
        *,
        memory_of: Callable[[Work], Memory] | None = None,
        deterministic: bool = False,
    ):
        self.model, self.pool, self.memory_of, self.deterministic = model, pool, memory_of, deterministic
        self.observe: Callable[[Work, Tensor], None] | None = None  # told of every work's hidden states (n, D)
        self.has_hidden = isinstance(model, Decoder | EncoderDecoder)

    @torch.inference_mode()
    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]:
        for group in self._groups(works):
            try:
                logits = self._read(group)
            except Exception as error:
                raise PassFailed(group, error) from error
            yield from logits

    def _groups(self, works: Sequence[Work]) -> Iterable[list[Work]]:
        groups: dict[object, list[Work]] = {}
        for i, work in enumerate(works):
            sequence = work.sequence
            apart = self.deterministic or sequence.alone or sequence.whole
            begins = self.memory_of is not None and sequence.length == 0
            groups.setdefault((i,) if apart or begins else (work.n, len(work.draft)), []).append(work)
        return groups.values()

    def _read(self, group: list[Work]) -> list[tuple[Work, Tensor | None]]:
        first = group[0].sequence
        if first.whole:
            tokens = first.tokens[-self.model.max_seq_len :]
            memory = self.memory_of(group[0]) if self.memory_of is not None else None
            inputs = Inputs(torch.tensor([tokens], device=self.pool.device), memory=memory)
            return [(group[0], self._logits(inputs, None, [0], 1)[0])]
        inputs = Inputs(torch.tensor([work.tokens for work in group], device=self.pool.device))
        if self.memory_of is not None and first.length == 0:
            inputs.memory = self.memory_of(group[0])
        sequences = [work.sequence for work in group]
        slots = [s.slot for s in sequences if s.slot is not None]
        state = self.pool.view([s.table for s in sequences], slots, [s.length for s in sequences])
        rows = [row for row, work in enumerate(group) if work.completes]
        logits = iter(self._logits(inputs, state, rows, 1 + len(group[0].draft), group))
        return [(work, next(logits) if work.completes else None) for work in group]

    def _logits(self, inputs: Inputs, state: Any, rows: list[int], n: int, group: Sequence[Work] = ()) -> Tensor:
        """After the last ``n`` tokens of some rows, (rows, n, V)."""
        if not self.has_hidden:
            return self.model(inputs, state=state, needs=("logits",)).logits[rows, -n:]
        hidden = self.model(inputs, state=state, needs=("hidden",)).hidden
        if self.observe is not None:
            for work, own in zip(group, hidden, strict=False):
                self.observe(work, own)
        return self.model.logits(hidden[rows, -n:]) if rows else hidden[:0]


class NativeExecutor:
    """Texts that go on, and short parts of prompts, in one native call (infer/native.py); the rest through ``plain``.

    A row of the native step does not depend on the others in it, so this is deterministic whenever ``plain`` is: which
    of the two reads a work is decided by its own length.
    """

    def __init__(self, model: Decoder, pool: Pool, plain: PlainExecutor):
        self.native, self.pool, self.plain = native.packed(model), pool, plain
        layers = [pool.buffers[f"{depth}.mixer"] for depth in range(self.native.n_layers)]
        self.keys, self.values = ([own[name] for own in layers] for name in ("k", "v"))

    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]:
        own = [work for work in works if self._serves(work)]
        if own:
            try:
                read = self._read(own)
            except Exception as error:
                raise PassFailed(own, error) from error
            yield from read
        if len(own) < len(works):
            yield from self.plain([work for work in works if not self._serves(work)])

    def _serves(self, work: Work) -> bool:
        sequence = work.sequence
        return work.n + len(work.draft) <= NATIVE_TOKENS and not sequence.whole and not sequence.alone

    def _read(self, works: list[Work]) -> list[tuple[Work, Tensor | None]]:
        tokens, whose, slots, wanted = list[int](), list[int](), list[int](), list[int]()
        for i, work in enumerate(works):
            new = work.tokens
            start = work.sequence.length
            tokens += new
            whose += [i] * len(new)
            slots += range(start, start + len(new))
            wanted += range(len(tokens) - work.n_wanted, len(tokens))
        tables = [work.sequence.table for work in works]
        widest = max(map(len, tables))
        numbers = torch.tensor([tokens, whose, slots])
        logits = self.native.step(
            numbers[0], numbers[1], numbers[2], numbers[2],
            torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int32),
            self.pool.block_size, torch.zeros_like(numbers[0]), self.keys, self.values, torch.tensor(wanted),
        )  # fmt: skip
        parts = iter(logits.split([work.n_wanted for work in works if work.completes]))
        return [(work, next(parts) if work.completes else None) for work in works]


def fastest(model: Any, pool: Pool, plain: PlainExecutor) -> Executor:
    """The native executor where it serves the model and can be built, else the plain one."""
    if native.unsuitable(model) or native.library()[1]:
        return plain
    return NativeExecutor(model, pool, plain)
