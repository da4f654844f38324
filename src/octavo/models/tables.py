"""The table of models: what ``model.kind`` in a recipe can be."""

from __future__ import annotations

from typing import Any

from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder

MODELS: dict[str, Any] = {"decoder": Decoder, "encoder_decoder": EncoderDecoder}
