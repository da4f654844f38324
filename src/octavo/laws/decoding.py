"""Laws of decode state: what was read before counts exactly as if it were read now."""

from __future__ import annotations

import torch

from octavo.laws.result import require, require_close
from octavo.laws.subject import Subject


def incremental(subject: Subject) -> None:
    """Any cut into prefill and decode, with packing and with padding in every chunk, equals one pass."""
    T, tokens = subject.n_tokens, subject.tokens(2)
    whole = subject.logits(tokens)
    for cuts in ([1] * T, [T // 2, T - T // 2], [4, 1, 1, T - 6]):
        state = subject.model.new_state(2, T)
        parts = [subject.logits(part, state) for part in tokens.split(cuts, 1)]
        require_close(torch.cat(parts, 1), whole, f"cut into {cuts}")
        require(bool((state.lengths == T).all()), f"after {T} tokens the state counts {state.lengths.tolist()}")
    _packed_in_chunks(subject)
    _padded_in_chunks(subject)


def _packed_in_chunks(subject: Subject) -> None:
    T, tokens = subject.n_tokens, subject.tokens(2, seed=2)
    doc_ids = torch.stack([torch.arange(T) * 3 // T, (torch.arange(T) >= 3).long()])
    whole = subject.logits(tokens, doc_ids=doc_ids)
    for cuts in ([1] * T, [5, T - 5]):
        state = subject.model.new_state(2, T)
        chunks = zip(tokens.split(cuts, 1), doc_ids.split(cuts, 1), strict=True)
        parts = [subject.logits(part, state, doc_ids=ids) for part, ids in chunks]
        require_close(torch.cat(parts, 1), whole, f"documents cut into {cuts}")


def _padded_in_chunks(subject: Subject) -> None:
    """Three chunks; padding left, right, in the middle, and a row that gets nothing at all."""
    T, rows = subject.n_tokens, 4
    tokens = subject.tokens(rows, 3 * 4, seed=3)
    chunk = torch.ones(rows, 4, dtype=torch.bool)
    first, second, third = chunk.clone(), chunk.clone(), chunk.clone()
    first[0, :2], first[1, 2:], first[2, 1:3], first[3] = False, False, False, False
    second[0], second[1, :1], second[2, 3:] = False, False, False
    third[0, 3:], third[3, :3] = False, False
    valid = torch.cat([first, second, third], 1)
    longest = int(valid.sum(1).max())
    require(longest <= T, f"the laws need max_seq_len >= {longest}")
    state = subject.model.new_state(rows, longest)
    chunks = zip(tokens.split(4, 1), valid.split(4, 1), strict=True)
    out = torch.cat([subject.logits(part, state, valid=ok) for part, ok in chunks], 1)
    require(bool((state.lengths == valid.sum(1)).all()), "padding is counted as text")
    for row in range(rows):
        alone = subject.logits(tokens[row : row + 1, valid[row]])
        require_close(out[row : row + 1, valid[row]], alone, f"padded chunks, row {row}")


def state(subject: Subject) -> None:
    """snapshot and restore go back; truncate forgets, or refuses and changes nothing; rows can be copied."""
    T, tokens = subject.n_tokens, subject.tokens(2)
    k = T - 4
    doc_ids = torch.stack([torch.arange(T) // 4, torch.zeros(T, dtype=torch.long)])
    text, rest = tokens[:, :k], tokens[:, k:]
    ids, rest_ids = doc_ids[:, :k], doc_ids[:, k:]
    wanted = subject.logits(tokens, doc_ids=doc_ids)[:, k:]

    held = subject.model.new_state(2, T)
    subject.logits(text, held, doc_ids=ids)
    saved = held.snapshot()
    other = subject.logits(tokens.flip(0)[:, :2], held, doc_ids=rest_ids[:, :2])
    held.restore(saved)
    require_close(subject.logits(rest, held, doc_ids=rest_ids), wanted, "after restore")

    held.restore(saved)
    require(held.truncate(held.lengths.clone()), "truncate to the present length is refused")
    require_close(subject.logits(rest, held, doc_ids=rest_ids), wanted, "after truncate to the present length")
    lengths = torch.tensor([k, k])
    if held.truncate(lengths):
        require_close(subject.logits(rest, held, doc_ids=rest_ids), wanted, "after truncate")
        shorter = torch.tensor([2, k - 1])
        require(held.truncate(shorter), "a state that could go back now cannot")
        require(torch.equal(held.lengths, shorter), "truncate left other lengths")
        again = subject.logits(rest, held, doc_ids=rest_ids)
        for row, n in enumerate(shorter.tolist()):
            line = torch.cat([text[row, :n], rest[row]])[None]
            line_ids = torch.cat([ids[row, :n], rest_ids[row]])[None]
            alone = subject.logits(line, doc_ids=line_ids)[:, n:]
            require_close(again[row : row + 1], alone, f"row {row} cut back to {n} tokens")
    else:
        require(bool((held.lengths == T).all()), "a refused truncate changed the lengths")
        held.restore(saved)
        replayed = subject.logits(tokens.flip(0)[:, :2], held, doc_ids=rest_ids[:, :2])
        require_close(replayed, other, "restored and replayed")

    held.restore(saved)
    held.select(torch.tensor([1, 0, 1]))
    picked = torch.tensor([1, 0, 1])
    require_close(subject.logits(rest[picked], held, doc_ids=rest_ids[picked]), wanted[picked], "rows copied")


def constant_state(subject: Subject) -> None:
    """A state for twice the tokens takes the same bytes."""
    n = subject.n_tokens // 2
    once, twice = (subject.model.new_state(1, tokens).payload_bytes for tokens in (n, 2 * n))
    require(once == twice, f"{once} bytes for {n} tokens, {twice} for {2 * n}")
