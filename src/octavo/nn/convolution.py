"""Convolutions over time: windows of the last tokens, long kernels, and a mixer made of a short one.

All of it is causal and respects document borders; padding, which stands at the end of every row, has no effect.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from octavo.nn.activation import ACTIVATIONS, ActivationName
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.projection import Projection
from octavo.nn.shift import segments, tail
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config

DIRECT = 64  # up to so many lags a matrix product is quicker than a Fourier transform


def windows(x: Tensor, width: int, dilation: int, ctx: Context, before: Tensor | None = None) -> Tensor:
    """For each token the inputs ``x_{t - (W-1-i) dilation}``, oldest first, zero before its document: (B, T, W, D).

    Args:
        x: (B, T, D).
        before: (B, (W - 1) dilation, D), what ``tail`` kept of the tokens before; None: nothing was before.
    """
    reach = (width - 1) * dilation
    padded = F.pad(x, (0, 0, reach, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    seen = padded.unfold(1, reach + 1, 1)[..., ::dilation].transpose(2, 3)
    if before is None and not ctx.restarts:
        return seen
    segment = F.pad(segments(ctx), (reach, 0))
    same = segment.unfold(1, reach + 1, 1)[..., ::dilation] == segment[:, reach:, None]
    return seen * same[..., None].to(x.dtype)


def toeplitz(lags: Tensor) -> Tensor:
    """The matrices ``M_ts = lags_{n-1+t-s}``: (C, 2n - 1) to (C, n, n)."""
    n = (lags.shape[-1] + 1) // 2
    return lags.flip(-1).unfold(-1, n, 1).flip(-2)


def fft_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = sum_{s <= t} k_{t-s} x_s`` of x (B, C, T) and k (C, T) by Fourier transforms: causal up to rounding."""
    T = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * T) * torch.fft.rfft(kernel, n=2 * T)
    return torch.fft.irfft(spectrum, n=2 * T)[..., :T]


def masked_convolution(x: Tensor, kernel: Tensor, segment: Tensor, size: int) -> Tensor:
    """``y_t = sum_s k_{t-s} x_s`` over the s <= t of t's block of ``size`` tokens and of t's document.

    A block is halved again and again. From the first half to the second only one document reaches, so that masks on
    both sides of an ordinary convolution are exact; nothing of another document or of a later token enters at all.

    Args:
        x: (B, C, n), n a multiple of ``size``, a power of two.
        kernel: (C, size).
        segment: (B, n), which document each token belongs to.
    """
    B, C, n = x.shape
    y = kernel[:, :1] * x
    half = 1
    while 2 * half <= size:
        blocks, of = x.view(B, C, -1, 2 * half), segment.view(B, 1, -1, 2 * half)
        crossing = of == of[..., half : half + 1]
        first = blocks[..., :half] * crossing[..., :half].to(x.dtype)
        if half <= DIRECT:
            into = torch.einsum("cts,bcns->bcnt", toeplitz(kernel[:, 1 : 2 * half]), first)
        else:  # what wraps around lands in the first half, which is thrown away
            spectrum = torch.fft.rfft(kernel[:, : 2 * half])[:, None] * torch.fft.rfft(first, n=2 * half)
            into = torch.fft.irfft(spectrum, n=2 * half)[..., half:]
        into = into * crossing[..., half:].to(x.dtype)
        y = y + F.pad(into, (half, 0)).view(B, C, n)
        half *= 2
    return y


def long_convolution(x: Tensor, kernel: Tensor, segment: Tensor | None) -> Tensor:
    """``y_t = sum_{s <= t} k_{t-s} x_s``, channel by channel, within documents.

    O(T log T) over whole rows, O(T log^2 T) over rows with documents. Over whole rows of more than 64 tokens it is
    causal up to rounding, else exactly.

    Args:
        x: (B, T, C).
        kernel: (C, T or more), one value a lag.
        segment: (B, T), which document each token belongs to; None: one document.

    Returns:
        (B, T, C).
    """
    T = x.shape[1]
    kernel = kernel[:, :T]
    if segment is not None:
        size = 1 << (T - 1).bit_length()
        x, kernel = F.pad(x.transpose(1, 2), (0, size - T)), F.pad(kernel, (0, size - T))
        y = masked_convolution(x, kernel, F.pad(segment, (0, size - T), value=-1), size)
        return y[..., :T].transpose(1, 2)
    if T <= DIRECT:
        return torch.einsum("cts,bsc->btc", toeplitz(F.pad(kernel, (T - 1, 0))), x)
    return fft_convolution(x.transpose(1, 2), kernel).transpose(1, 2)


def direct_convolution(x: Tensor, kernel: Tensor, segment: Tensor | None) -> Tensor:
    """The plain twin of ``long_convolution``: lag by lag."""
    y = kernel[:, 0] * x
    for lag in range(1, x.shape[1]):
        past = x[:, :-lag]
        if segment is not None:
            past = past * (segment[:, :-lag] == segment[:, lag:])[..., None].to(x.dtype)
        y = y + F.pad(kernel[:, lag] * past, (0, 0, lag, 0))
    return y


class Convolution(Mixer):
    """``o(act(sum_i W_i x_{t - (W-1-i) dilation} + b))``: a window of the last tokens, each with a matrix of its own.

    The causal convolution of WaveNet (van den Oord et al. 2016, section 2.1) and of Dauphin et al. 2017, as
    torch.nn.Conv1d over all channels; here the activation is not a gate. A stack of layers sees
    1 + sum (width - 1) dilation tokens (``reach`` is one layer's share).
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["convolution"] = "convolution"
        width: int = Field(default=4, ge=1, description="tokens under the window")
        dilation: int = Field(default=1, ge=1, description="from one token under the window to the next")
        channels: int | None = Field(default=None, ge=1, description="default: d_model")
        activation: ActivationName = "gelu"
        bias: bool = True

    def __init__(self, config: Convolution.Config, dims: Dims):
        super().__init__()
        self.config, self.d_model = config, dims.d_model
        channels = config.channels or dims.d_model
        self.reach = (config.width - 1) * config.dilation
        self.activation = ACTIVATIONS[config.activation]
        self.up = Projection(config.width * dims.d_model, channels, "up", bias=config.bias)
        self.o = Projection(channels, dims.d_model, "o", bias=config.bias)

    def state_spec(self) -> StateSpec:
        return {"x": StateField("row", (self.reach, self.d_model))} if self.reach else {}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        before = state.read("x") if state is not None else None
        seen = windows(x, self.config.width, self.config.dilation, ctx, before).flatten(2)
        if state is not None and before is not None:
            state.write(x=tail(x, before, ctx))
        return self.o(self.activation(self.up(seen))), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * sum(p.d_in * p.d_out for p in (self.up, self.o))

    def predicted_parameters(self) -> int:
        return self.up.n_parameters() + self.o.n_parameters()
