"""Compiled models run uncompiled while they are watched: their compiled code would not call the hooks.

``torch.compiler.set_stance`` holds for the process, and a run may be given up between two steps, by an exception too.
So what is held is bound to the models: with the last one that is watched, the stance goes.
"""

import sys
import weakref
from contextlib import ExitStack

import torch
from torch import nn

__all__ = ["run_eagerly"]

_stance = ExitStack()  # of the process, as torch's own
_watched: set[object] = set()


def run_eagerly(model: nn.Module) -> "weakref.finalize[[object], nn.Module]":
    """Use no compiled code in this process, and make none anew, for as long as the model lives.

    Returns:
        What ends it earlier when called; calling it again does nothing.
    """
    if "torch._dynamo" in sys.modules and not _watched:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    token = object()
    _watched.add(token)
    end = weakref.finalize(model, _end, token)
    end.atexit = False
    return end


def _end(token: object) -> None:
    _watched.discard(token)
    if not _watched:
        _stance.close()
