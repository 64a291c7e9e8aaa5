"""Tests run offline, each process on one thread: two test processes share two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.register_assert_rewrite("tests.commands", "tests.processes")
from tests.commands import trained  # noqa: F401
from tests.float64 import float64  # noqa: F401
from tests.processes import go, start, tiny  # noqa: F401
