"""The yardstick: the model's own forward pass as training calls it, in fp32, each text read whole and alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.batch import Batch
from octavo.certify.prompts import Prompt
from octavo.nn.contracts import Inputs, full_precision
from octavo.objectives.likelihood import CausalLikelihood

TOGETHER = 8  # rows of a pass


class Reference:
    """What ``model`` says: the greedy text after every prompt, and ln p of every token of prompt and text.

    Args:
        n_tokens: the first rows of the head, which are tokens of the vocabulary; what pads it is left out everywhere.
        texts: not to be chosen by the model itself, but these.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        *,
        n_tokens: int,
        stop_ids: frozenset[int],
        n_new: int,
        texts: Sequence[list[int]] | None = None,
    ):
        self.model, self.n_tokens, self.stop_ids, self.n_new = model, n_tokens, stop_ids, n_new
        self.prompts = [list(prompt.ids) for prompt in prompts]
        self.texts = self._greedy() if texts is None else [list(text) for text in texts]
        self.rows = [[*prompt, *text] for prompt, text in zip(self.prompts, self.texts, strict=True)]
        self.scores = [self._scores(row) for row in self.rows]

    @torch.inference_mode()
    def _last(self, rows: Sequence[list[int]]) -> Tensor:
        """ln p of what follows each row, (rows, n_tokens)."""
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        valid = torch.arange(longest) < lengths[:, None]
        inputs = Inputs(tokens, valid=None if bool(valid.all()) else valid, padding="end")
        hidden = self.model(inputs, needs=("hidden",)).hidden
        return self._log_probs(self.model.logits(hidden[torch.arange(len(rows)), lengths - 1]))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return full_precision(logits[..., : self.n_tokens]).log_softmax(-1)

    def _greedy(self) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in self.prompts]
        going = list(range(len(texts)))
        for _ in range(self.n_new):
            for start in range(0, len(going), TOGETHER):
                part = going[start : start + TOGETHER]
                best = self._last([[*self.prompts[i], *texts[i]] for i in part]).argmax(-1).tolist()
                for i, token in zip(part, best, strict=True):
                    texts[i].append(token)
            going = [i for i in going if texts[i][-1] not in self.stop_ids]
        return texts

    @torch.inference_mode()
    def _scores(self, row: list[int]) -> np.ndarray:
        tokens = torch.tensor([row])
        table = self._log_probs(self.model(Inputs(tokens), needs=("logits",)).logits[0, :-1])
        return table.gather(-1, tokens[0, 1:, None])[:, 0].double().numpy()

    def gap(self, i: int, at: int, token: int) -> float:
        """By how much ln p of the best token exceeds that of ``token``, after ``at`` tokens of text ``i``."""
        table = self._last([[*self.prompts[i], *self.texts[i][:at]]])[0]
        return float(table.max() - table[token])

    @torch.inference_mode()
    def packed(self) -> tuple[list[np.ndarray], float, float]:
        """The same scores out of rows as training reads them, documents one after another; the mean loss of the
        training objective over these rows, and the mean of the scores it should be."""
        objective, found, losses, weights, total = CausalLikelihood(), list[np.ndarray](), 0.0, 0.0, 0.0
        for documents in self._filled():
            batch = as_training_row(documents)
            outputs = self.model(batch.inputs(), needs=("logits",))
            losses += float(objective.loss_sum(outputs, batch))
            weights += float(objective.weight(batch))
            everything = full_precision(outputs.logits[0]).log_softmax(-1).gather(-1, batch.targets[0, :, None])[:, 0]
            total -= float(everything[batch.loss_mask[0] > 0].double().sum())
            scores = self._log_probs(outputs.logits[0])
            targets = batch.targets[0].clamp(max=self.n_tokens - 1)
            ours = scores.gather(-1, targets[:, None])[:, 0].double().numpy()
            start = 0
            for document in documents:
                found.append(ours[start : start + len(document) - 1])
                start += len(document)
        return found, losses / weights, total / weights

    def _filled(self) -> list[list[list[int]]]:
        """Rows of documents, each as many as the context holds."""
        if not self.model.capabilities.packed:
            return [[row] for row in self.rows]
        rows: list[list[list[int]]] = []
        longest = min(self.model.max_seq_len, max(512, *(len(row) for row in self.rows)))
        for document in self.rows:
            if not rows or sum(map(len, rows[-1])) + len(document) > longest:
                rows.append([])
            rows[-1].append(document)
        return rows


def as_training_row(documents: Sequence[Sequence[int]]) -> Batch:
    """Documents one after another in a row, as ``data.pack`` makes them."""
    tokens = np.concatenate([np.array(document, np.int64) for document in documents])
    ids = np.concatenate([np.full(len(document), i, np.int64) for i, document in enumerate(documents)])
    positions = np.concatenate([np.arange(len(document)) for document in documents])
    targets, after = np.append(tokens[1:], 0), np.append(ids[1:], -1)
    arrays = {
        "tokens": tokens, "targets": targets, "loss_mask": after == ids, "doc_ids": ids, "positions": positions,
        "valid": np.ones(len(tokens), bool),
    }  # fmt: skip
    return Batch.from_numpy({name: array[None] for name, array in arrays.items()})
