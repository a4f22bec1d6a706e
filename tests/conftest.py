"""Settings of the whole suite: no network, one thread, the same examples in every run."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of child processes: two test workers share two cores

settings.register_profile("flowra", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("flowra")


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
