"""Fixtures of the server tests."""

from functools import partial

import pytest
import serving

from octavo.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return serving.chat_tokenizer()


@pytest.fixture
def client(tokenizer: Tokenizer) -> serving.Client:
    """``async with client(reply=..., config=...) as http``."""
    return partial(serving.connect, tokenizer)


@pytest.fixture
def live(tokenizer: Tokenizer):
    """``with live(reply=..., settings=...) as server``."""
    return partial(serving.live, tokenizer)
