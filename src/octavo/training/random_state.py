"""The state of every global random generator as JSON-able text, so that a checkpoint needs no pickle."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def capture_random() -> dict[str, Any]:
    """The state of every global random generator (Python, numpy, torch on CPU and CUDA), as JSON."""
    import numpy
    import torch

    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=False)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def text(state: torch.Tensor) -> str:
        return base64.b64encode(state.numpy().tobytes()).decode()

    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": text(torch.get_rng_state()),
        "cuda": [text(state) for state in devices],
    }


def restore_random(captured: Mapping[str, Any]) -> None:
    """Put every generator back to where ``capture_random`` found it.

    Raises:
        CheckpointError: the text is not what ``capture_random`` writes.
    """
    import numpy
    import torch

    def state(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)

    try:
        version, words, gauss = captured["python"]
        random.setstate((version, tuple(words), gauss))
        numpy_state = captured["numpy"]
        key = numpy.array(numpy_state["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
        torch.set_rng_state(state(captured["torch"]))
        for device, text in enumerate(captured["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state(text), device)
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the saved random state cannot be restored: {error}", fix="load another step") from None
