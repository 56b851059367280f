"""What tests of models share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread: several that wait for each other at every word of a tiny LSTM take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
