"""Cached decoding of any predictor: prompts in, pieces of text out.

Rows of different lengths are decoded together, padded on the right; every row draws from its own random
stream, so it gets the tokens it would get alone. This is the plain loop that a faster engine is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.infer import native
from octavo.infer.sampling import SamplingConfig, draw, generators, shape
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs, Memory

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

PREFILL_TOKENS = 256
"""Tokens a row reads in one pass: bounds the memory of the logits, and how long a cancelled prompt runs on."""
PROMPT_TAIL = 8
"""Tokens of the prompt the text decoder hears: more than one character can have."""

OnFull = Literal["crop", "stop"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """ln p of a chosen token under the model itself (T = 1, nothing excluded), and the best alternatives."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One decoding step of one row: the token, the text that became certain with it, and why the row ended."""

    row: int
    id: int
    text: str
    finish_reason: FinishReason | None = None
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a row produced. ``ids`` has every token, a stop token too; ``text`` has neither that nor a stop string."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    scores: tuple[TokenScore, ...] = ()


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
    n_top: int | None = None,
) -> list[Completion]:
    """Complete every prompt; see ``pieces`` for the arguments.

    Returns:
        One completion per prompt, in their order.
    """
    steps: list[list[Piece]] = [[] for _ in prompts]
    for piece in pieces(model, tokenizer, prompts, config, stop_ids=stop_ids, on_full=on_full, n_top=n_top):
        steps[piece.row].append(piece)
    return [
        Completion(
            "".join(piece.text for piece in row),
            tuple(piece.id for piece in row),
            row[-1].finish_reason or "length",
            tuple(piece.score for piece in row if piece.score is not None),
        )
        for row in steps
    ]


def stream(
    model: Any,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
) -> Iterator[str]:
    """The completion of one prompt, as soon as each whole character of it is certain."""
    for piece in pieces(model, tokenizer, [prompt], config, stop_ids=stop_ids, on_full=on_full):
        if piece.text:
            yield piece.text


def pieces(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    stop_ids: Collection[int] | None = None,
    on_full: OnFull = "crop",
    n_top: int | None = None,
) -> Iterator[Piece]:
    """Decode all prompts together, one token a row and step.

    For an encoder-decoder a prompt is the source, and what is decoded is the target from its first token on.

    Args:
        model: a predictor (``nn.contracts.Predictor`` with ``new_state``).
        prompts: (rows,) token ids, at least one each.
        config: how to choose and when to stop; row i draws from the stream ``seed + i``.
        stop_ids: tokens that end a row; by default the tokenizer's end of text and end of turn.
        on_full: what happens at ``max_seq_len`` tokens. ``crop`` keeps the last ``max_seq_len`` tokens and reads
            them anew for every token (the textbook loop of GPT-2; the cache cannot help, as every position moves).
            ``stop`` refuses a prompt that leaves no room and ends a row when the context is full.
        n_top: with a number, every piece carries its log-probability and those of the ``n_top`` best tokens.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or a prompt too long under ``stop``.
        NumericError: the model's output is not a number.
    """
    config = config or SamplingConfig()
    _check(model, tokenizer, prompts, config, on_full)
    ends = frozenset(tokenizer.stop_ids if stop_ids is None else stop_ids)
    n_tokens = min(model.vocab_size, tokenizer.vocab_size)  # rows that pad the embedding are not text
    sources = prompts if isinstance(model, EncoderDecoder) else None
    prompts = [[model.config.first_token(tokenizer.special)] for _ in prompts] if sources is not None else prompts
    texts = [_Text(tokenizer, prompt, config.stop) for prompt in prompts]
    streams = generators(config, len(prompts))
    produced: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    new: list[Sequence[int]] = list(prompts)
    with evaluating(model):
        window = Window(model, prompts, config.max_new_tokens, sources)
        while unfinished:
            rows = sorted(unfinished)
            logits = window.read(new)[rows, :n_tokens].float()
            shaped = shape(logits, config, [prompts[r] for r in rows], [produced[r] for r in rows])
            chosen = draw(shaped, [streams[r] for r in rows]).tolist()
            scores = _scores(logits, chosen, n_top)
            new = [()] * len(prompts)
            for row, token, score in zip(rows, chosen, scores, strict=True):
                produced[row].append(token)
                new[row] = (token,)
                text, reason = texts[row].push(token, token in ends)
                n_used = len(prompts[row]) + len(produced[row])
                full = on_full == "stop" and n_used >= model.max_seq_len
                if reason is None and (full or len(produced[row]) >= config.max_new_tokens):
                    rest, reason = texts[row].flush("length")
                    text += rest
                if reason is not None:
                    unfinished.discard(row)
                    new[row] = ()
                yield Piece(row, token, text, reason, score)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A plain text as the model saw texts in training: after the beginning-of-text token, where there is one."""
    bos = tokenizer.special.bos
    return [*([] if bos is None else [bos]), *tokenizer.encode(text)]


def encode_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """A plain text as an encoder reads it: between the tokens that begin and end texts, where there are such."""
    eos = tokenizer.special.eos
    return [*encode_prompt(tokenizer, text), *([] if eos is None else [eos])]


class Window:
    """What the model has read of each row: cached while all fit into its context, then cropped and read anew.

    A source is encoded once; what the model reads of it, it keeps in the state, or is given again.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sources: Sequence[Sequence[int]] | None = None,
    ):
        self.model = model
        self.memory: Memory | None = None
        self.rows: list[list[int]] = [[] for _ in prompts]
        needed = max(len(prompt) for prompt in prompts) + max_new_tokens
        with torch.inference_mode():
            self.state = model.new_state(len(prompts), min(needed, model.max_seq_len))
        self.device = self.state.lengths.device
        if sources is not None:
            source, valid = _padded(sources)
            with torch.inference_mode():
                self.memory = model.encode(source.to(self.device), valid.to(self.device))
        self.native = None if native.unsuitable(model, self.state) or native.library()[1] else native.NativeStep
        self.step: native.NativeStep | None = None

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append ``new`` tokens to each row; the logits (B, V) after each row's last token, any where none is new."""
        for row, ids in zip(self.rows, new, strict=True):
            row.extend(ids)
        limit = self.model.max_seq_len
        if self.state is not None and max(len(row) for row, ids in zip(self.rows, new, strict=True) if ids) <= limit:
            if self.native is not None and max(map(len, new)) == 1:
                return self._native_step(new)
            return self._forward(new, PREFILL_TOKENS)
        self.state = None
        return self._forward(
            [row[-limit:] if ids else row[-1:] for row, ids in zip(self.rows, new, strict=True)], limit
        )

    def select(self, rows: Sequence[int]) -> None:
        """Keep (or copy) the rows given by index, in that order."""
        assert self.state is not None
        self.rows = [list(self.rows[row]) for row in rows]
        self.native = None  # it knows the rows by their place
        with torch.inference_mode():
            self.state.select(torch.tensor(rows, device=self.device))

    def _native_step(self, new: Sequence[Sequence[int]]) -> Tensor:
        if self.step is None:
            assert self.state is not None
            self.step = native.NativeStep(self.model, self.state)
        rows = [row for row, ids in enumerate(new) if ids]
        logits = self.step(torch.tensor([new[row][0] for row in rows]), torch.tensor(rows))
        if len(rows) == len(new):
            return logits
        return logits.new_zeros(len(new), logits.shape[1]).index_copy_(0, torch.tensor(rows), logits)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]], n_at_once: int) -> Tensor:
        lengths = [len(row) for row in rows]
        tokens, valid = (tensor.to(self.device) for tensor in _padded(rows))
        last: list[Tensor | None] = [None] * len(rows)
        for start in range(0, tokens.shape[1], n_at_once):
            part = slice(start, start + n_at_once)
            padded = min(lengths) < min(part.stop, tokens.shape[1])
            inputs = Inputs(tokens[:, part], valid=valid[:, part] if padded else None)
            if self.memory is not None and (self.state is None or not self.state.used):
                inputs.memory = self.memory
            logits = self.model(inputs, state=self.state, needs=("logits",)).logits
            for row, length in enumerate(lengths):
                if part.start < length <= part.stop:
                    last[row] = logits[row, length - 1 - start]
        nothing = next(row for row in last if row is not None)
        return torch.stack([nothing if row is None else row for row in last])


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded at the end, and where they are text."""
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]


class _Text:
    """Token ids to text that is certain: whole characters, and nothing that may yet become a stop string.

    The decoder hears the end of the prompt first: prompt and completion together read as one text, although a
    decoder drops the space before the first word of a text, and a prompt may end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.decoder, self.stops = tokenizer.stream(), stops
        self.pending = ""
        for token in prompt[-PROMPT_TAIL:]:
            self.decoder.push(token)

    def push(self, token: int, is_end: bool) -> tuple[str, FinishReason | None]:
        if is_end:
            return self.flush("stop")
        self.pending += self.decoder.push(token)
        return self._release(self._held())

    def flush(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """What was held back, up to a stop string that the last bytes completed."""
        self.pending += self.decoder.flush()
        text, stopped = self._release(0)
        return text, stopped or reason

    def _release(self, n_held: int) -> tuple[str, FinishReason | None]:
        found = [at for stop in self.stops if (at := self.pending.find(stop)) >= 0]
        cut = min(found, default=len(self.pending) - n_held)
        text, self.pending = self.pending[:cut], self.pending[cut:]
        return text, "stop" if found else None

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.pending))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(self.pending[-n:]) for stop in self.stops))
        return next(ends, 0)


def _scores(logits: Tensor, chosen: Sequence[int], n_top: int | None) -> Sequence[TokenScore | None]:
    if n_top is None:
        return [None] * len(chosen)
    table = logits.log_softmax(-1)
    best = table.topk(min(n_top, table.shape[-1]), -1)
    return [
        TokenScore(token, float(row[token]), tuple(zip(ids, values, strict=True)))
        for token, row, ids, values in zip(chosen, table, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _check(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], config: SamplingConfig, on_full: OnFull
) -> None:
    check_prompts(model, prompts, on_full)
    n_tokens = min(model.vocab_size, tokenizer.vocab_size)
    if outside := [token for token in config.logit_bias if not 0 <= token < n_tokens]:
        raise ConfigError(f"logit_bias names token {outside[0]}, the vocabulary is 0..{n_tokens - 1}", fix="remove it")


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], on_full: OnFull) -> None:
    """Refuse prompts that ``model`` cannot read, as ``pieces`` says."""
    if not prompts:
        raise ConfigError("there is no prompt to complete", fix="give at least one list of token ids")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {row} has no tokens", fix="begin with the beginning-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ConfigError(
                f"prompt {row} has a token id outside 0..{model.vocab_size - 1}",
                fix="encode it with this model's tokenizer",
            )
        if on_full == "stop" and len(prompt) >= model.max_seq_len and not isinstance(model, EncoderDecoder):
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, the model's context is {model.max_seq_len}",
                fix="shorten it, or start a new conversation",
            )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off while decoding, as it was afterwards (a training loop samples from its own model)."""
    training = isinstance(model, torch.nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
