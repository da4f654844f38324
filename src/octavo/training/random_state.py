"""Random numbers that can be drawn again: the seed of a step, and the state of every global generator as JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def step_seed(seed: int, step: int) -> int:
    """A 63-bit number from two (splitmix64's finaliser), so that near seeds and steps share nothing."""
    z = (seed * 0x9E3779B97F4A7C15 + step + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


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
