"""Torch's threads around what is chosen between two steps."""

import pytest
import torch

from octavo.infer.threads import FEW, one_thread


@pytest.fixture(autouse=True)
def _three():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_few_numbers_are_for_one_thread():
    with one_thread(FEW):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), one_thread(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 3


def test_many_are_for_all():
    with one_thread(FEW + 1):
        assert torch.get_num_threads() == 3
