"""How much memory operations ask for, seen from inside torch."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocated(TorchDispatchMode):
    """The largest storage that any operation created, in bytes, and by which; ``known`` tensors do not count."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.by = size, str(function)
        return out
