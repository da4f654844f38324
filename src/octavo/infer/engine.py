"""The engine: many requests decoded together on one pool of memory, a step at a time.

A step is one pass of the model (or a few) over the next token of every running text and over parts of waiting prompts;
it returns what became certain. Nothing runs between steps: a request is added or cancelled there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.errors import ConfigError, NumericError, ResourceError
from octavo.infer import native
from octavo.infer.blocks import Blocks
from octavo.infer.drafts import Asked, Drafter, ModuleDraft
from octavo.infer.executors import Executor, PassFailed, PlainExecutor, executor_of
from octavo.infer.memory import Pool, bytes_of, free_bytes, kind_of
from octavo.infer.request import Constraint, EngineConfig, Failure, Request, check_prompts
from octavo.infer.said import Said
from octavo.infer.sampling import choice_settings, choose, generator, judge
from octavo.infer.scheduler import Plan, Scheduler, Work
from octavo.infer.scheduler import Sequence as Text
from octavo.infer.text import CertainText, Piece, TokenScore
from octavo.infer.threads import one_thread
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Memory

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

SHARE_OF_MEMORY = 0.5
"""Of the memory that is free, what a state may take where its size is not said."""


Event = tuple[Request, Piece | Failure]


@dataclass(eq=False)
class _Row:
    """A text of a request while it is decoded."""

    request: Request
    index: int
    text: CertainText
    stream: torch.Generator
    sequence: Text
    how: tuple[object, ...]
    constraint: Constraint | None
    followers: list[_Row] = field(default_factory=list)
    drawn_from: Tensor | None = None  # the distributions that its draft was drawn from

    def __post_init__(self) -> None:
        tokens, n_prompt = self.sequence.tokens, self.sequence.n_prompt
        self.prompt, self.produced = Said(tokens, 0, n_prompt), Said(tokens, n_prompt)


class Engine:
    """Requests in, pieces out.

    Args:
        model: a predictor (``nn.contracts.Predictor``), not training.
        executor: makes what runs the model on a pool; by default as ``config.executor`` says.
        drafter: proposes tokens that the model then judges in one pass; the answers have the same distribution.

    Raises:
        ResourceError: the pool does not fit into memory.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        executor: Callable[[Any, Pool], Executor] | None = None,
        drafter: Drafter | None = None,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        self.drafter = drafter
        if drafter is not None and self.config.deterministic:
            raise ConfigError("a draft changes which tokens are read together", fix="use one of draft, deterministic")
        self.n_tokens = min(model.vocab_size, tokenizer.vocab_size)  # rows that pad the embedding are not text
        config, specs, dtype, device = self.config, model.state_specs(), *kind_of(model)
        limit = model.max_seq_len
        token_bytes, _ = bytes_of(specs, dtype, limit)
        size = min(config.block_size, limit)
        capacity = config.max_tokens or config.max_sequences * limit
        if config.max_tokens is None and token_bytes:
            capacity = min(capacity, max(limit, int(SHARE_OF_MEMORY * free_bytes(device)) // token_bytes))
        self.n_blocks = -(-capacity // size) if token_bytes else 0
        try:
            self.pool = Pool(
                specs, n_blocks=self.n_blocks, block_size=size, n_slots=config.max_sequences, max_tokens=limit,
                dtype=dtype, device=device, aside=0 if native.unsuitable(model) else self.step_tokens,
            )  # fmt: skip
        except RuntimeError:  # torch's own error of memory
            wanted = self.n_blocks * size * token_bytes
            raise ResourceError(
                f"a decode state of {capacity:,} tokens takes {wanted / 2**30:.1f} GiB, which there is not",
                fix="lower max_tokens or max_sequences of the engine",
            ) from None
        plain = self._plain()
        self.executor = (
            executor(model, self.pool) if executor else executor_of(config.executor, model, self.pool, plain)
        )
        if isinstance(drafter, ModuleDraft):
            self.executor, plain.observe = plain, drafter.observe
        self._order = itertools.count()
        self.reset()

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step."""
        return max(self.config.step_tokens, self.config.chunk)

    def reset(self) -> None:
        """Forget every request and every text."""
        config, size = self.config, self.pool.block_size
        self.blocks = Blocks(self.n_blocks, size) if self.n_blocks else None
        self.scheduler = Scheduler(
            self.blocks, config.max_sequences, step_tokens=self.step_tokens, chunk=config.chunk,
            share=config.share_prefixes and self.pool.only_tokens and not isinstance(self.drafter, ModuleDraft),
            deterministic=config.deterministic,
        )  # fmt: skip
        self.rows: dict[int, _Row] = {}
        self.n_drafted = self.n_accepted = 0

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.rows)

    def add(self, request: Request) -> None:
        """Take a request; its pieces come out of ``step``.

        Raises:
            ConfigError: an empty prompt, an id outside the vocabulary, or a prompt too long for ``stop``.
            ResourceError: it could not be held even alone.
        """
        check_prompts(self.model, [request.prompt], request.on_full)
        for token in request.config.logit_bias:
            if not 0 <= token < self.n_tokens:
                raise ConfigError(
                    f"logit_bias names token {token}, the vocabulary is 0..{self.n_tokens - 1}", fix="remove it"
                )
        prompt = list(request.prompt)
        if isinstance(self.model, EncoderDecoder):
            prompt = [self.model.config.first_token(self.tokenizer.special)]
        limit = self.model.max_seq_len
        longest = min(len(prompt) + request.config.max_new_tokens, limit)
        if self.blocks is not None and -(-longest // self.blocks.block_size) > self.n_blocks:
            raise ResourceError(
                f"the request may grow to {longest:,} tokens, more than the {self.n_blocks * self.blocks.block_size:,}"
                " that the engine holds",
                fix="ask for fewer tokens, or raise the engine's max_tokens",
            )
        how = (*choice_settings(request.config), request.n_top)
        leader: _Row | None = None
        for i in range(request.n):
            sequence = Text(list(prompt), len(prompt), (request.priority, next(self._order)), request.within)
            stream = generator(request.config, request.first_stream + i)
            text = CertainText(self.tokenizer, prompt, request.config.stop)
            constraint = request.constraint(prompt, request.stop_ids) if request.constraint else None
            row = _Row(request, i, text, stream, sequence, how, constraint)
            sequence.owner = row
            if len(prompt) > limit:
                self.scheduler.read_whole(sequence)
            elif leader is None:
                leader = row
            else:
                sequence.leader = leader.sequence
                leader.followers.append(row)
            self.rows[id(sequence)] = row
            self.scheduler.add(sequence)

    def cancel(self, request: Request) -> None:
        """Nothing more comes of it, and what it held is free."""
        for row in [row for row in self.rows.values() if row.request is request]:
            self._end(row)

    def step(self) -> list[Event]:
        """Read what is next; every token that was chosen, and every request that failed."""
        if self.drafter is not None:
            self._draft(self.drafter)
        plan = self.scheduler.plan()
        saved = self._prepare(plan)
        events, known = list[Event](), list[tuple[_Row, Tensor]]()
        left = dict.fromkeys(plan.works)
        while left:
            try:
                for work, logits in self.executor(list(left)):
                    del left[work]
                    if work.draft and logits is not None:
                        events += self._judged(work, logits, saved.get(work))
                    else:
                        known += self._read(work, logits)
            except PassFailed as failed:
                for work in failed.works:
                    del left[work]
                    events += self._failed(work, failed.cause, len(failed.works))
        return events + self._chosen(known)

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def figures(self) -> dict[str, float]:
        """What is going on: texts running and waiting, blocks held, idle and free, and what happened so far."""
        blocks = self.blocks
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks": self.n_blocks,
            "blocks_held": blocks.n_held if blocks else 0,
            "blocks_idle": blocks.n_idle if blocks else 0,
            "slots_held": self.config.max_sequences - len(self.scheduler.slots),
            "preempted": self.scheduler.n_preempted,
            "tokens_shared": self.scheduler.n_shared,
            "tokens_drafted": self.n_drafted,
            "tokens_accepted": self.n_accepted,
        }

    def _plain(self) -> PlainExecutor:
        memory_of = self._memory_of if isinstance(self.model, EncoderDecoder) else None
        return PlainExecutor(self.model, self.pool, memory_of=memory_of, deterministic=self.config.deterministic)

    def _memory_of(self, work: Work) -> Memory:
        source = torch.tensor([list(work.sequence.owner.request.prompt)], device=self.pool.device)
        return self.model.encode(source)

    def _prepare(self, plan: Plan) -> dict[Work, Any]:
        """Copy and clear what the plan says; what a recurrence must go back to where its draft does not hold."""
        with torch.inference_mode():
            for source, target in plan.block_copies:
                self.pool.copy_block(source, target)
            for origin, slot in plan.slots:
                if origin is None:
                    self.pool.clear(slot)
                else:
                    self.pool.copy_slot(origin, slot)
            if self.pool.goes_back:
                return {}
            return {work: self.pool.save(work.sequence.slot) for work in plan.works if work.draft}  # type: ignore[arg-type]

    def _read(self, work: Work, logits: Tensor | None) -> Iterable[tuple[_Row, Tensor]]:
        """A work is done: the rows whose next token can be chosen."""
        row: _Row = work.sequence.owner
        if id(work.sequence) not in self.rows:
            return
        self.scheduler.advance(work.sequence, work.n)
        if logits is not None:
            work.sequence.alone = False
            for other in (row, *row.followers):
                yield other, logits[-1]
            row.followers = []

    def _draft(self, drafter: Drafter) -> None:
        """Let every text that goes on have a draft, as far as it may still go."""
        asked = list[Asked]()
        for sequence in self.scheduler.running:
            row: _Row = sequence.owner
            sequence.draft = []
            n, request = len(sequence.tokens), row.request
            room = min(request.config.max_new_tokens - (n - sequence.n_prompt), self.model.max_seq_len - n) - 1
            if sequence.pending == 1 and room > 0 and not sequence.whole and row.constraint is None:
                settings = (request.config, row.prompt, row.produced, row.stream, row.how, self.n_tokens)
                asked.append(Asked(sequence, room, *settings))
        for one, draft in zip(asked, drafter.propose(asked), strict=True):
            sequence, tokens = one.text, draft.tokens[: one.room]
            sequence.draft = list(itertools.takewhile(lambda token: 0 <= token < self.n_tokens, tokens))
            sequence.owner.drawn_from = draft.drawn_from

    def _judged(self, work: Work, logits: Tensor, saved: Any) -> Iterable[Event]:
        """A draft was read: what is accepted of it and the token after it. The state goes back behind the rest."""
        sequence, row = work.sequence, work.sequence.owner
        if id(sequence) not in self.rows:
            return
        request = row.request
        try:
            with one_thread(logits.numel()):
                logits = logits[:, : self.n_tokens].float()
                drafted = work.draft, request.config, row.prompt, row.produced, row.stream, row.drawn_from
                chosen = judge(logits, *drafted)
                scores = token_scores(logits[: len(chosen)], chosen, request.n_top)
        except NumericError as error:
            self.cancel(request)
            yield request, Failure(error)
            return
        self.n_drafted += len(work.draft)
        self.n_accepted += len(chosen) - 1
        for token, score in zip(chosen, scores, strict=True):
            yield self._pushed(row, token, score)
            if id(sequence) not in self.rows:
                return
        n_read = work.n + len(chosen) - 1
        if len(chosen) <= len(work.draft) and not self.pool.goes_back:
            assert sequence.slot is not None  # a recurrence cannot go back: it is put back, and reads again what holds
            self.pool.load(sequence.slot, saved)
            n_read = 0
        self.scheduler.advance(sequence, n_read)

    def _failed(self, work: Work, cause: Exception, n_together: int) -> Iterable[Event]:
        """A pass failed: alone it is this request's fault; otherwise each is read anew in a pass of its own."""
        sequence = work.sequence
        if id(sequence) not in self.rows:
            return []
        if n_together > 1:
            sequence.alone = True
            self.scheduler.put_back(sequence)
            return []
        row: _Row = sequence.owner
        self.cancel(row.request)
        return [(row.request, Failure(cause))]

    def _chosen(self, known: list[tuple[_Row, Tensor]]) -> list[Event]:
        """The next token of every row, those with the same settings together."""
        events = list[Event]()
        groups: dict[object, list[tuple[_Row, Tensor]]] = {}
        for row, logits in known:
            groups.setdefault(row.how, []).append((row, logits))
        for rows in groups.values():
            with one_thread(sum(logits.numel() for _, logits in rows)):
                events += self._choose([row for row, _ in rows], torch.stack([logits for _, logits in rows]))
        return events

    def _choose(self, rows: list[_Row], logits: Tensor) -> Iterable[Event]:
        logits = logits[:, : self.n_tokens].float()
        request = rows[0].request
        given = logits
        try:
            if any(row.constraint for row in rows):
                logits = logits.clone()
                for row, own in zip(rows, logits, strict=True):
                    if row.constraint is not None:
                        row.constraint.mask(own)
            prompts, produced = [row.prompt for row in rows], [row.produced for row in rows]
            chosen = choose(logits, request.config, prompts, produced, [row.stream for row in rows])
        except Exception as error:  # a grammar that leads nowhere, numbers that are none, or a bug
            if len(rows) > 1:  # one of them: each for itself
                for row, own in zip(rows, given.unsqueeze(1), strict=True):
                    yield from self._choose([row], own)
            elif id(rows[0].sequence) in self.rows:
                self.cancel(request)
                yield request, Failure(error)
            return
        scores = token_scores(given, chosen, request.n_top)
        for row, token, score in zip(rows, chosen, scores, strict=True):
            if id(row.sequence) in self.rows:
                yield self._pushed(row, token, score)

    def _pushed(self, row: _Row, token: int, score: TokenScore | None) -> Event:
        """A token joins its text; what goes wrong there is the fault of its own request alone."""
        try:
            return row.request, self._push(row, token, score)
        except Exception as error:
            self.cancel(row.request)
            return row.request, Failure(error)

    def _push(self, row: _Row, token: int, score: TokenScore | None) -> Piece:
        sequence, request = row.sequence, row.request
        sequence.tokens.append(token)
        text, reason = row.text.push(token, token in request.stop_ids)
        if row.constraint is not None and row.constraint.accept(token) and reason is None:
            rest, reason = row.text.flush("stop")
            text += rest
        if reason is None and self._full(row):
            rest, reason = row.text.flush("length")
            text += rest
        if reason is not None:
            self._end(row)
        elif len(sequence.tokens) > self.model.max_seq_len and not sequence.whole:
            self.scheduler.read_whole(sequence)
        return Piece(row.index, token, text, reason, score)

    def _full(self, row: _Row) -> bool:
        request, n = row.request, len(row.sequence.tokens)
        if n - row.sequence.n_prompt >= request.config.max_new_tokens:
            return True
        return request.on_full == "stop" and n >= self.model.max_seq_len

    def _end(self, row: _Row) -> None:
        if self.rows.pop(id(row.sequence), None) is not None:
            self.scheduler.remove(row.sequence)


def token_scores(logits: Tensor, chosen: Sequence[int], n_top: int | None) -> Sequence[TokenScore | None]:
    """ln p of the chosen tokens and of the ``n_top`` best, by logits (B, V)."""
    if n_top is None:
        return [None] * len(chosen)
    table = logits.log_softmax(-1)
    best = table.topk(min(n_top, table.shape[-1]), -1)
    return [
        TokenScore(token, float(row[token]), tuple(zip(ids, values, strict=True)))
        for token, row, ids, values in zip(chosen, table, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
