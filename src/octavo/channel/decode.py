"""The text behind a signal: Viterbi over the lattice of a channel with the context of an n-gram, or a beam of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from octavo.channel.contract import Channel, Edge, Reading
from octavo.channel.language import CharacterModel, Context
from octavo.errors import ConfigError, DataError

TextLogProbs = Callable[[Sequence[str]], Sequence[float]]


class _Path(NamedTuple):
    score: float
    language: float
    channel: float
    text: str
    context: Context


class _Column:
    """The best paths to one place, a few for each context: what follows depends on nothing else."""

    def __init__(self, n_best: int):
        self.n_best = n_best
        self.states: dict[Context, list[_Path]] = {}

    def add(self, path: _Path) -> None:
        held = self.states.setdefault(path.context, [])
        same = next((i for i, other in enumerate(held) if other.text == path.text), None)
        if same is not None:
            if held[same].score >= path.score:
                return
            del held[same]
        elif len(held) >= self.n_best and held[-1].score >= path.score:
            return
        held.append(path)
        held.sort(key=lambda other: -other.score)
        del held[self.n_best :]

    def paths(self, beam: int | None) -> list[_Path]:
        """All paths, or those of the ``beam`` best contexts."""
        states = self.states.values()
        if beam is not None and len(self.states) > beam:
            states = heapq.nlargest(beam, states, key=lambda held: held[0].score)
        return [path for held in states for path in held]


def decode(
    model: CharacterModel,
    channel: Channel,
    signal: str,
    *,
    beam: int | None = 32,
    n_best: int = 1,
    weight: float = 1.0,
    before: str = "",
    end: bool = False,
) -> list[Reading]:
    """The texts with the largest ``weight * ln p(text) + ln p(signal, alignment | text)``, the best first.

    Exact (Viterbi) with ``beam=None``: paths that end in the same n-gram context at the same place are compared and
    the best kept. Otherwise only so many contexts live on at each place.

    Args:
        n_best: how many different texts.
        weight: of the language model.
        before: text before the signal, in the same document.
        end: whether the document ends with the signal.

    Raises:
        DataError: the channel knows no text behind the signal.
    """
    if n_best < 1 or (beam is not None and beam < 1):
        raise ConfigError("a search needs one path or more", fix="use a beam of 32")
    columns = [_Column(n_best) for _ in range(len(signal) + 1)]
    columns[0].add(_Path(0.0, 0.0, 0.0, "", model.start(before)))
    finals: dict[str, Reading] = {}
    eos = model.tokenizer.special.eos if end else None
    for at, column in enumerate(columns):
        live = column.paths(beam)
        column.states.clear()
        edges = channel.edges(signal, at)
        silent, further = [e for e in edges if e.to == at], [e for e in edges if e.to > at]
        reached, front = list(live), live
        for _ in range(channel.max_gap if silent else 0):
            gap = _Column(n_best)
            _advance(model, front, silent, [gap], at, weight, beam)
            front = gap.paths(beam)
            reached += front
        _advance(model, reached, further, columns, 0, weight, beam)
        if at == len(signal) and reached:
            closing = np.zeros(len(reached))
            if eos is not None:
                closing = model.tables([path.context for path in reached])[:, eos]
            for path, last in zip(reached, closing.tolist(), strict=True):
                heard, said = path.channel + channel.end, path.language + last
                reading = Reading(path.text, weight * said + heard, said, heard)
                if reading.text not in finals or finals[reading.text].log_prob < reading.log_prob:
                    finals[reading.text] = reading
    if not finals:
        raise DataError(f"no text is known behind {signal[:80]!r}", fix="give a larger table or alphabet")
    return heapq.nlargest(n_best, finals.values(), key=lambda reading: reading.log_prob)


def _advance(
    model: CharacterModel,
    paths: Sequence[_Path],
    edges: Sequence[Edge],
    columns: Sequence[_Column],
    first: int,
    weight: float,
    beam: int | None,
) -> None:
    """Continue every path by every edge; ``columns[edge.to - first]`` takes what comes of it."""
    if not paths or not edges:
        return
    by_target: dict[int, list[tuple[Edge, Context]]] = {}
    for edge in edges:
        by_target.setdefault(edge.to, []).append((edge, model.ids(edge.text)))
    tables = model.tables([path.context for path in paths]) if any(e.text for e in edges) else None
    scores = np.array([path.score for path in paths])
    for to, group in by_target.items():
        # p(text of the edge | path), (paths, edges)
        said = np.zeros((len(paths), len(group)))
        for column, (_, ids) in enumerate(group):
            if ids and tables is not None:
                said[:, column] = tables[:, ids[0]]
        for column, (_, ids) in enumerate(group):
            for k in range(1, len(ids)):
                said[:, column] += model.tables([model.extend(path.context, ids[:k]) for path in paths])[:, ids[k]]
        heard = np.array([edge.log_prob for edge, _ in group])
        total = (scores[:, None] + weight * said + heard).ravel()
        chosen: Iterable[int] = range(len(total))
        if beam is not None:
            room = 2 * beam * columns[to - first].n_best  # some of them will meet in one context
            if len(total) > room:
                chosen = np.argpartition(-total, room)[:room].tolist()
        for index in chosen:
            row, column = divmod(index, len(group))
            score = float(total[index])
            if score == -np.inf:
                continue
            (edge, ids), path = group[column], paths[row]
            columns[to - first].add(
                _Path(
                    score,
                    path.language + float(said[row, column]),
                    path.channel + edge.log_prob,
                    path.text + edge.text,
                    model.extend(path.context, ids),
                )
            )


def rescore(readings: Sequence[Reading], log_probs: TextLogProbs, *, weight: float = 1.0) -> list[Reading]:
    """The same texts in the order of another model: ``weight * ln p(text) + channel``, the best first.

    Args:
        log_probs: ln p of each of some texts, by any predictor (``LanguageModel.log_probs``).
    """
    said = [float(value) for value in log_probs([reading.text for reading in readings])]
    made = [
        Reading(reading.text, weight * value + reading.channel, value, reading.channel)
        for reading, value in zip(readings, said, strict=True)
    ]
    return sorted(made, key=lambda reading: -reading.log_prob)
