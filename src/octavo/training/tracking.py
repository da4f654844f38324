"""TensorBoard, the optional extra `track`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


def tensorboard(folder: Path) -> Any:
    """A writer into ``folder/tensorboard``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fix = "pip install 'octavo[track]'"
        raise ConfigError("tensorboard = true needs the package tensorboard", fix=fix) from None
    return SummaryWriter(str(folder / "tensorboard"))
