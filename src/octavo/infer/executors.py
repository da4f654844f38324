"""Who runs the model: some tokens of some sequences in, the logits after each one's last token out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer import native
from octavo.infer.memory import NextTokens, Pool
from octavo.infer.scheduler import Work
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs, Memory

log = logging.getLogger(__name__)

NATIVE_TOKENS = 16
"""Tokens of a bf16 work that the native step reads where there are matrix tiles, which torch uses for longer parts."""


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
    """Texts that go on and parts of prompts in one native call (infer/native.py); the rest through ``plain``.

    A row of the native step does not depend on the others in it, so this is deterministic whenever ``plain`` is: which
    of the two reads a work is decided by its own length.
    """

    def __init__(self, model: Decoder, pool: Pool, plain: PlainExecutor):
        self.native, self.pool, self.plain = native.packed(model), pool, plain
        layers = [pool.buffers[f"{depth}.mixer"] for depth in range(self.native.n_layers)]
        keys, values = ([own[name] for own in layers] for name in ("k", "v"))
        self.memory = native.Memory(self.native, keys, values, [native.marks_of(own) for own in layers])
        self.room = self.memory.aside  # tokens of a step, where some follow others of their text
        tiles = self.native.embedding.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        self.most = NATIVE_TOKENS if tiles else sys.maxsize

    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]:
        own = [work for work in works if self._serves(work)]
        for group in self._groups(own):
            try:
                read = self._read(group)
            except Exception as error:
                raise PassFailed(group, error) from error
            yield from read
        if len(own) < len(works):
            yield from self.plain([work for work in works if not self._serves(work)])

    def _serves(self, work: Work) -> bool:
        sequence, n = work.sequence, work.n + len(work.draft)
        return n <= self.most and (n == 1 or n <= self.room) and not sequence.whole and not sequence.alone

    def _groups(self, works: list[Work]) -> Iterable[list[Work]]:
        """All together, or as many as rings have room for; a row is the same in either."""
        sizes = [work.n + len(work.draft) for work in works]
        if not works or max(sizes) == 1 or sum(sizes) <= self.room:
            return [works] if works else []
        groups, left = [[works[0]]], self.room - sizes[0]
        for work, size in zip(works[1:], sizes[1:], strict=True):
            if size > left:
                groups.append([])
                left = self.room
            groups[-1].append(work)
            left -= size
        return groups

    def _read(self, works: list[Work]) -> list[tuple[Work, Tensor | None]]:
        tokens, whose, slots, rows, wanted = list[int](), list[int](), list[int](), list[int](), list[int]()
        for i, work in enumerate(works):
            new = work.tokens
            start = work.sequence.length
            tokens += new
            whose += [i] * len(new)
            slots += range(start, start + len(new))
            rows += [work.sequence.slot or 0] * len(new)
            wanted += range(len(tokens) - work.n_wanted, len(tokens))
        tables = [work.sequence.table for work in works]
        widest = max(1, *map(len, tables))
        numbers = torch.tensor([tokens, whose, slots, rows])
        logits = self.native.step(
            numbers[0], numbers[1], numbers[2], numbers[2],
            torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int32),
            self.pool.block_size, torch.zeros_like(numbers[0]), self.memory, torch.tensor(wanted),
            rows=numbers[3],
        )  # fmt: skip
        parts = iter(logits.split([work.n_wanted for work in works if work.completes]))
        return [(work, next(parts) if work.completes else None) for work in works]


class CompiledExecutor:
    """Texts that go on by one token, through the model's own forward pass compiled; the rest through ``plain``.

    It is compiled when it is first needed: once for a text alone, once for any number of them, each time about a
    minute. What cannot be compiled, for want of a compiler or because of the model, is read by ``plain``.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, model: Any, pool: Pool, plain: PlainExecutor, backend: Any = "inductor"):
        self.model, self.pool, self.plain = model, pool, plain
        # Apart from those of other engines in this process, which would use up the number of versions there may be.
        self.step = torch.compile(self._step, fullgraph=True, backend=backend, isolate_recompiles=True)  # type: ignore[call-overload]
        self.broken = not plain.has_hidden or bool(pool.memories) or not model.capabilities.compilable

    def __call__(self, works: Sequence[Work]) -> Iterable[tuple[Work, Tensor | None]]:
        own = [] if self.broken else [work for work in works if self._serves(work)]
        rest = [work for work in works if work not in own]
        for group in [[work] for work in own] if self.plain.deterministic else [own] if own else []:
            try:
                read = self._read(group)
            except Exception as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise PassFailed(group, error) from error
                self.broken = True  # nothing of the pass was run
                log.warning("the decode step cannot be compiled, it is read plainly: %s", str(error).split("\n", 1)[0])
                read = self.plain(group)
            yield from read
        if rest:
            yield from self.plain(rest)

    def _serves(self, work: Work) -> bool:
        return work.n == 1 and not work.draft and not work.sequence.whole and not work.sequence.alone

    @torch.inference_mode()
    def _read(self, works: list[Work]) -> list[tuple[Work, Tensor | None]]:
        sequences, device = [work.sequence for work in works], self.pool.device
        widest = max(2, *(len(s.table) for s in sequences))  # a size of 1 is compiled for itself
        tables = torch.tensor([[*s.table, *[0] * (widest - len(s.table))] for s in sequences], device=device)
        numbers = torch.tensor([[s.tokens[s.length], s.length, s.slot] for s in sequences], device=device)
        if len(works) > 1:
            torch._dynamo.maybe_mark_dynamic(numbers, 0)
            torch._dynamo.maybe_mark_dynamic(tables, 0)
        torch._dynamo.maybe_mark_dynamic(tables, 1)
        logits = self.step(numbers, tables)
        return [(work, own if work.completes else None) for work, own in zip(works, logits, strict=True)]

    def _step(self, numbers: Tensor, tables: Tensor) -> Tensor:
        """Logits (B, 1, V) after one more token of each; numbers (B, 3): token, tokens held, slot."""
        tokens, lengths, slots = numbers.unbind(1)
        state = NextTokens(self.pool, lengths, slots, tables)
        hidden = self.model(Inputs(tokens[:, None]), state=state, needs=("hidden",)).hidden
        return self.model.logits(hidden)


def executor_of(kind: str, model: Any, pool: Pool, plain: PlainExecutor) -> Executor:
    """The executor that ``EngineConfig.executor`` names.

    Raises:
        ConfigError: the native step does not serve the model, or cannot be built.
    """
    if kind == "compiled":
        return CompiledExecutor(model, pool, plain)
    if kind == "native" and (why := native.unsuitable(model) or native.library()[1]):
        raise ConfigError(f"the native step does not serve this model: {why}", fix="use executor auto")
    return plain if kind == "plain" else fastest(model, pool, plain)


def fastest(model: Any, pool: Pool, plain: PlainExecutor) -> Executor:
    """The native executor where it serves the model and can be built, else the plain one."""
    if native.unsuitable(model) or native.library()[1]:
        return plain
    return NativeExecutor(model, pool, plain)
