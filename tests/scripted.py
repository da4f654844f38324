"""A predictor that says what it is told to: to test what happens around a model, not the model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from octavo.nn.contracts import Inputs, Outputs
from octavo.nn.state import ContiguousState, State, StateField, StateSpec


class Scripted:
    """Continues every text with ``reply``: after its first k tokens the next one has all the probability.

    Args:
        delay_seconds: how long one pass takes.
        fail_after: raise after this many tokens of the reply.
    """

    def __init__(
        self,
        reply: Sequence[int],
        vocab_size: int,
        *,
        max_seq_len: int = 4096,
        delay_seconds: float = 0.0,
        fail_after: int | None = None,
    ):
        self.reply, self.vocab_size, self.max_seq_len = list(reply), vocab_size, max_seq_len
        self.delay_seconds, self.fail_after = delay_seconds, fail_after
        self.n_passes = 0

    def state_specs(self) -> dict[str, StateSpec]:
        return {"script": {"known": StateField("row", (), torch.long)}}

    def new_state(self, rows: int, max_tokens: int | None = None) -> ContiguousState:
        return ContiguousState(self.state_specs(), rows, max_tokens or self.max_seq_len, torch.float32)

    def __call__(self, inputs: Inputs, state: State | None = None, needs: tuple[str, ...] = ("logits",)) -> Outputs:
        self.n_passes += 1
        time.sleep(self.delay_seconds)
        B, T = inputs.tokens.shape
        valid = inputs.valid if inputs.valid is not None else torch.ones(B, T, dtype=torch.bool)
        layer = None
        if state is not None:
            state.begin(inputs)
            layer = state.layer("script")
        known = layer.read("known").tolist() if layer is not None else [0] * B
        logits = torch.full((B, T, self.vocab_size), -30.0)
        for row in range(B):
            for t in range(T):
                if valid[row, t]:
                    known[row] = self._after(known[row], int(inputs.tokens[row, t]))
                    logits[row, t, self.reply[known[row]]] = 30.0
        if layer is not None:
            layer.write(known=torch.tensor(known))
        return Outputs(logits=logits)

    def _after(self, known: int, token: int) -> int:
        """How much of the reply has been said after ``token``."""
        known = known + 1 if token == self.reply[known] else int(token == self.reply[0])
        known = min(known, len(self.reply) - 1)
        if self.fail_after is not None and known >= self.fail_after:
            raise RuntimeError("the script ends here")
        return known
