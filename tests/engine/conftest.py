import sys
from pathlib import Path

import pytest

# Helper modules of these tests, and train_net.py.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


@pytest.fixture(autouse=True)
def all_placed(placed, device, monkeypatch):
    """What trains in the test's own process follows --device."""
    monkeypatch.setattr("ris_toy.DEVICE", device)
