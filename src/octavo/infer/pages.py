"""Memory in large pages, where the system has them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

PAGE = 1 << 21


def large_pages(n_bytes: int) -> Tensor:
    """(n_bytes,) uint8, zeros, in pages of 2 MiB.

    What is read from end to end for every token costs a core a quarter more with pages of 4 KiB: it looks up addresses.
    The memory is given back with the tensor, and taken from the system only as it is written.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or n_bytes < PAGE:
        return torch.zeros(n_bytes, dtype=torch.uint8)
    buffer = mmap.mmap(-1, n_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:n_bytes]


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``, in large pages on the CPU."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return large_pages(prod(shape) * dtype.itemsize).view(dtype).view(shape)
