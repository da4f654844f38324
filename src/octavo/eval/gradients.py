"""How much of an error reaches the tokens before it: vanishing and exploding gradients, measured."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from octavo.errors import UnsupportedError
from octavo.models.decoder import Decoder
from octavo.nn.contracts import Inputs


def gradient_by_position(
    model: Decoder, inputs: Inputs, targets: Tensor, *, layer: int = 0, relative: bool = False
) -> Tensor:
    """``|dL / dx_t|`` for every token t of every row, (B, T): L is the loss of each row's last token, ``targets`` (B,).

    x_t is what layer ``layer`` reads: 0 is the embedded token. Whatever leads from t to the end is in it, the residual
    stream (which carries only the last token's own), a hidden state or a look back. In a recurrent network it is the
    product of the steps' Jacobians, which shrinks or grows by a factor a step (Bengio et al. 1994; Pascanu et al.
    2013); in attention the way has one step however far it is. Padding gets 0.

    Args:
        relative: in units of ``|dL / dlogits|``: how much of the error arrives, however large it is. Where a model is
            nearly always right its loss has hardly any gradient to carry, near or far.

    Raises:
        UnsupportedError: no such layer.
    """
    if not 0 <= layer < model.config.n_layers:
        raise UnsupportedError(f"there is no layer {layer}", fix=f"0 to {model.config.n_layers - 1}")
    inputs, moved = inputs.with_padding_last()  # the states of moved rows would be copies, off the way to the loss
    with torch.enable_grad():
        outputs = model(inputs, needs=("logits", "hidden_states"))
        if outputs.logits is None or outputs.hidden_states is None:
            raise TypeError("the model gave no logits or hidden states")
        rows, order = torch.arange(len(targets)), torch.arange(inputs.tokens.shape[1])
        last = order[-1] if inputs.valid is None else torch.where(inputs.valid, order, 0).amax(1)
        logits = outputs.logits[rows, last]
        losses = cross_entropy(logits, targets, reduction="none")
        if relative:
            error = logits.detach().softmax(-1) - torch.nn.functional.one_hot(targets, logits.shape[-1])
            losses = losses / error.norm(dim=-1)
        (found,) = torch.autograd.grad(losses.sum(), outputs.hidden_states[layer])
    norms = found.norm(dim=-1)
    return norms if moved is None else norms.gather(1, moved)
