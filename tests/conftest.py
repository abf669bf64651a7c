import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # fastest for models this small


@pytest.fixture(scope="session")
def real():
    """The real checkpoint; README's test command fetches it first."""
    path = ROOT / "weights" / "smollm2-135m-q4"
    assert path.exists(), "run: python weights/get.py smollm2-135m-q4"
    return path
