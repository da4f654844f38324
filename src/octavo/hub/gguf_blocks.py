"""GGUF's quantised types that are our integers: blocks of 32 inputs, ``W = scale * (code - zero)``, a float16 scale.

Codes of 8 bits have the zero 128, of 4 bits 8, so Q8_0 and Q4_0 are ours number for number, in both directions.
Q5_0's 32 levels and IQ4_NL's table of 16 are whole numbers of 8 bits too, so they are kept as such. Types with an
offset or with scales of scales (Q4_1, Q4_K, Q6_K ...) are not of this form. Source: ggml, ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from octavo.hub.gguf_file import GGUFFile, require

if TYPE_CHECKING:
    from octavo.hub.small_weights import Codes

BLOCK = 32
KEPT: dict[str, Literal[4, 8]] = {"Q8_0": 8, "Q4_0": 4, "Q5_0": 8, "IQ4_NL": 8}
"""Types that are read without loss, and the bits of the codes that they become."""
WRITTEN: dict[int, tuple[str, int]] = {8: ("Q8_0", 7), 4: ("Q4_0", 2)}
"""By bits: ggml's type, and llama.cpp's number for a file that is mostly of it."""


def read(file: GGUFFile, name: str) -> Codes:
    """The codes and scales of a matrix (N, K) that is stored in a type of ``KEPT``."""
    import torch

    from octavo.hub.small_weights import Codes
    from octavo.nn.quantized import ZERO, packed

    package, entry = require(), file.tensors[name]
    kind = file.type_name(name)
    bits = KEPT[kind]
    blocks = file.raw(name).reshape(-1, package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][1])
    scales = blocks[:, :2].copy().view("<f2").reshape(entry.shape[0], -1)
    blocks[:, :2] = np.array([1.0], "<f2").view(np.uint8)  # what the package then gives are the whole numbers
    steps = package.quants.dequantize(blocks.reshape(entry.shape[0], -1), package.GGMLQuantizationType[kind])
    codes = torch.from_numpy((steps + ZERO[bits]).astype(np.uint8)).view(entry.shape)
    return Codes(bits, packed(codes, bits), torch.from_numpy(scales), kind)


def bytes_of(codes: Codes) -> np.ndarray:
    """A matrix as GGUF stores it, (N, bytes of a row) uint8."""
    whole = codes.unpacked().numpy()
    blocks = whole.reshape(len(whole), -1, BLOCK)
    scales = codes.scales.numpy().astype("<f2").view(np.uint8).reshape(len(whole), -1, 2)
    if codes.bits == 8:
        numbers: Any = blocks - np.uint8(128)  # turned over at 256: the bits of a signed number
    else:
        numbers = blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)
    return np.concatenate([scales, numbers], -1).reshape(len(whole), -1)
