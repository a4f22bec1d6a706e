"""Bfloat16 where the processor multiplies it: twice as fast with instructions for it, many times slower without."""

import time
from functools import cache

import torch

__all__ = ["autocast", "fast_dtype"]


@cache
def fast_dtype() -> torch.dtype:
    """Multiply in both, and return the faster of float32 and bfloat16."""
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other, tries = torch.ones(128, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype), []
        for _ in range(5):
            began = time.perf_counter()
            one @ other
            tries.append(time.perf_counter() - began)
        taken[dtype] = min(tries)
    return min(taken, key=lambda dtype: taken[dtype])


def autocast() -> torch.autocast:
    """Multiply in the faster of the two."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)
