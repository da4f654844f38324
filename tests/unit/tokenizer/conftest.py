"""Every kind of tokenizer, trained once for all tests of this folder."""

import pytest
from tokenizer_texts import KINDS, trained

from octavo.tokenizer import Tokenizer


@pytest.fixture
def make():
    return trained


@pytest.fixture(params=KINDS)
def any_tokenizer(request) -> Tokenizer:
    return trained(request.param)
