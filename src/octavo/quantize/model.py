"""A model with quantised products in the place of its own, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import ConfigError
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.projection import GroupedProjection, Projection
from octavo.nn.quantized import (
    Float8Weights,
    IntegerWeights,
    Quantized,
    QuantizedGroupedProjection,
    Storage,
    empty_for,
    packed,
    put,
    quantized_modules,
    to_codes,
    to_float8,
)
from octavo.quantize import calibrate, solve
from octavo.quantize.scheme import KEPT_ROLES, SCHEMES, Scheme

OnProgress = Callable[[int, int], None]


@torch.no_grad()
def quantize(
    model: Any,
    scheme: Scheme | str,
    calibration: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Any:
    """A copy of ``model`` with its weight products quantised; the model itself stays as it is.

    Args:
        model: a decoder or an encoder-decoder.
        scheme: a ``Scheme``, or the name of one in SCHEMES.
        calibration: rows of tokens (N, T), all of the same length: integer weights are then solved for against what
            each product reads on them (GPTQ), block by block. Without, integers of 4 bits are rounded under the
            clipping that errs least, everything else to nearest.
        on_progress: called with products done and all there are.

    Raises:
        ConfigError: quantised already, or calibration where the scheme or the model has no use for it.
    """
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    if quantized_modules(model):
        raise ConfigError("the model is quantised already", fix="start from the model that it was made of")
    if calibration is not None:
        _check_calibration(model, scheme)
    dtype = next(model.parameters()).dtype
    made = _with_own_head(copy.deepcopy(model).eval().float(), scheme)
    stored = {name: storage for name, module in products(made).items() if (storage := storage_of(name, module, scheme))}
    report = _Report(on_progress, len(stored))

    def replace(name: str, moment: calibrate.Moment | None) -> None:
        module = made.get_submodule(name)
        assert isinstance(module, Projection | GroupedProjection)
        put(made, name, quantized(module, stored[name], moment))
        report.one_more()

    if calibration is not None:
        rows = torch.as_tensor(calibration, dtype=torch.long)
        calibrate.through_blocks(made, rows, frozenset(stored), replace)
    for name in stored:
        if not isinstance(made.get_submodule(name), Quantized):
            replace(name, None)
    return made.to(dtype).eval()


def quantized(module: Projection | GroupedProjection, storage: Storage, moment: calibrate.Moment | None) -> Quantized:
    """The quantised product of one: solved where there are moments of its inputs, else rounded."""
    made = empty_for(module, storage)
    weight = module.weight.detach().float()
    if isinstance(storage, Float8Weights):
        made.codes, made.scales = to_float8(weight, storage.format, storage.block)
    else:
        H = None if moment is None else moment.H
        if isinstance(made, QuantizedGroupedProjection):
            each = [_integers(weight[g], storage, None if H is None else H[g]) for g in range(made.n)]
            codes, scales = (torch.stack(part) for part in zip(*each, strict=True))
        else:
            codes, scales = _integers(weight, storage, H)
        made.codes, made.scales = packed(codes, storage.bits), scales
    bias = getattr(module, "bias", None)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _integers(weight: Tensor, storage: IntegerWeights, H: Tensor | None) -> tuple[Tensor, Tensor]:
    group = storage.group_of(weight.shape[1])
    if H is not None and H.diagonal().any():  # an expert that nothing was sent to has no moments
        return solve.solved(weight, H, storage.bits, group)
    if storage.bits == 8:
        return solve.nearest(weight, 8, group)
    scales = solve.clipped(weight, 4, group)
    return to_codes(weight, scales, 4), scales


@torch.no_grad()
def dequantized(model: Any) -> Any:
    """A copy of a quantised model with plain weights: what the codes stand for, in the model's dtype."""
    made = copy.deepcopy(model)
    for name, module in quantized_modules(made).items():
        grouped = isinstance(module, QuantizedGroupedProjection)
        bias = getattr(module, "bias", None)
        with torch.device("meta"):
            plain = (
                GroupedProjection(module.n, module.d_in, module.d_out, module.role)
                if grouped
                else Projection(module.d_in, module.d_out, module.role, bias=bias is not None)
            )
        plain.weight = nn.Parameter(module.weight.contiguous())
        if bias is not None:
            plain.bias = bias  # type: ignore[assignment]
        put(made, name, plain)
    return made


def products(model: nn.Module) -> dict[str, Projection | GroupedProjection]:
    """Every weight product by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Projection | GroupedProjection)}


def storage_of(name: str, module: Projection | GroupedProjection, scheme: Scheme) -> Storage | None:
    """How ``scheme`` stores a product; None if it stays."""
    if module.role in KEPT_ROLES:
        return None
    if module.role == "head" and scheme.head != "same":
        return IntegerWeights(bits=8, group=64) if scheme.head == "int8" else None
    return scheme.weights


def _with_own_head(model: Any, scheme: Scheme) -> Any:
    """Give each decoder with a tied head one of its own, of the same numbers, unless the head is kept."""
    if scheme.head == "kept":
        return model
    if isinstance(model, Decoder):
        _untie(model)
    elif isinstance(model, EncoderDecoder):
        _untie(model.decoder)
        half = model.config.decoder.model_copy(update={"tie_embeddings": False})
        model.config = model.config.model_copy(update={"decoder": half})
    return model


def _untie(model: Decoder) -> None:
    if model.head is not None:
        return
    bias = model.head_bias
    head = Projection(model.config.d_model, model.vocab_size, "head", bias=bias is not None)
    head.weight = nn.Parameter(model.embed.weight.detach().clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().clone())
    model.head, model.head_bias = head, None
    model.config = model.config.model_copy(update={"tie_embeddings": False})


def _check_calibration(model: Any, scheme: Scheme) -> None:
    if isinstance(scheme.weights, Float8Weights):
        raise ConfigError("8-bit floats are rounded to nearest: calibration has no part in them",
                          fix="leave the calibration text out")  # fmt: skip
    if not isinstance(model, Decoder):
        raise ConfigError("only decoders are calibrated", fix="leave the calibration text out")
    if len(set(model.uses)) < len(model.uses):
        raise ConfigError("layers that share one set of weights are not calibrated",
                          fix="leave the calibration text out")  # fmt: skip


class _Report:
    def __init__(self, tell: OnProgress | None, n: int):
        self.tell, self.n, self.done = tell, n, 0

    def one_more(self) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(self.done, self.n)
