"""word2vec written to be read: the twin of nn/kernels/word2vec.cpp.

One prediction has an input x (the vector of a word, or the mean of its neighbours' vectors) and outputs k with a row
o_k and a sign s_k: +1 where the answer is yes, -1 where it is no. With sigma the logistic function::

    loss = - sum_k log sigma(s_k x . o_k)
    - d loss / d o_k = s_k sigma(- s_k x . o_k) x        - d loss / d x = sum_k s_k sigma(- s_k x . o_k) o_k

With negative samples the outputs are the right word (+1) and the wrong ones (-1), a wrong word that is the right one
left out; with a Huffman tree they are the nodes on the way to the word. gensim has the same formulas, but walks through
the outputs one after the other; we take the gradient of the whole sum, so a word drawn twice makes the difference.
For the mean of n vectors the step of x belongs to each of them by 1 / n: ``cbow_step`` says whether it is so.
"""

from __future__ import annotations

import numpy as np

from octavo.vectors.draws import Draws
from octavo.vectors.task import Task


def predict(
    x: np.ndarray, output: np.ndarray, rows: np.ndarray, signs: np.ndarray, rate: float
) -> tuple[float, np.ndarray]:
    """One step of gradient descent on ``output[rows]``, in place.

    Returns:
        The loss before the step, and the step that x has to take.
    """
    score = signs * (output[rows] @ x)
    step = signs / (1 + np.exp(score)) * np.float32(rate)
    step_of_x = step @ output[rows]
    np.add.at(output, rows, np.outer(step, x))  # a row that was drawn twice takes both steps
    return float(np.logaddexp(0, -score.astype(np.float64)).sum()), step_of_x


def outputs(task: Task, target: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The output rows that are asked about ``target``, and the right answers."""
    if task.tree is not None:
        way = slice(task.tree.starts[target], task.tree.starts[target + 1])
        return task.tree.nodes[way], task.tree.signs[way]
    wrong = [draws.word(task.share, task.other) for _ in range(task.negative)]
    rows = [target] + [word for word in wrong if word != target]
    return np.array(rows), np.array([1.0] + [-1.0] * (len(rows) - 1), np.float32)


def train(task: Task, epoch: int, first: int, last: int) -> tuple[float, int]:
    """Train on the units of text ``first`` to ``last`` - 1.

    Returns:
        The sum of losses, and the number of yes-or-no answers in it.
    """
    key, loss, answers = task.key(epoch), 0.0, 0
    for unit in range(first, last):
        kept: list[tuple[int, int, Draws]] = []
        for place in range(int(task.starts[unit]), int(task.starts[unit + 1])):
            draws, word = Draws(key, place), int(task.tokens[place])
            if draws.next() >> 32 < task.keep[word]:
                kept.append((place, word, draws))
        for i, (place, word, draws) in enumerate(kept):
            reach = 1 + draws.below(task.window)
            neighbours = [other for _, other, _ in kept[max(0, i - reach) : i] + kept[i + 1 : i + 1 + reach]]
            if not neighbours:
                continue
            rate = task.rate_at(epoch, place)
            # The mean of the neighbours predicts the word, or the word predicts each neighbour.
            work = [(neighbours, word)] if task.cbow else [([word], neighbour) for neighbour in neighbours]
            for sources, target in work:
                rows, signs = outputs(task, target, draws)
                x = task.input[sources].mean(0)
                new, step = predict(x, task.output, rows, signs, rate)
                np.add.at(task.input, sources, step if task.whole else step / np.float32(len(sources)))
                loss, answers = loss + new, answers + len(rows)
    return loss, answers
