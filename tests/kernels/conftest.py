"""Triton reads TRITON_INTERPRET when it defines a kernel, so interpreted tests have a process of their own.

Files named test_*_interpreter.py are collected only under TRITON_INTERPRET=1; test_interpreter.py runs them there.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*_interpreter.py"]


@pytest.fixture
def poisoned_memory():
    """Fills what torch.empty returns with NaN, so that an element no kernel writes shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
