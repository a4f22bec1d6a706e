"""Norms that gather running statistics, such as BatchNorm, while adapters are on their model.

In training they would count every batch into buffers that no file of an adapter holds, so after a reload the base would
answer with statistics of its own. While there are adapters, these norms use what they have and leave it alone, whatever
the mode. Those inside a module that is trained in full go on, for their buffers are saved with it.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["freeze_statistics", "thaw_statistics"]

HANDLES = "_flowra_frozen_statistics"
"""Attribute of a frozen norm: what removes its hooks."""


class Frozen:
    """Puts a norm into evaluation mode for the length of each pass."""

    def __init__(self) -> None:
        self.mode = False

    def before(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember the mode, and leave it."""
        self.mode, norm.training = norm.training, False

    def after(self, norm: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Go back to the mode, also after an error."""
        norm.training = self.mode


def freeze_statistics(model: nn.Module, *, trained: Iterable[nn.Module] = ()) -> None:
    """Freeze the running statistics of a model's norms, but for those inside modules that are trained in full."""
    own = {id(each) for module in trained for each in module.modules()}
    for norm in model.modules():
        if id(norm) in own:
            _thaw(norm)
        elif isinstance(norm, _NormBase) and norm.running_mean is not None and HANDLES not in norm.__dict__:
            frozen = Frozen()
            norm.__dict__[HANDLES] = (
                norm.register_forward_pre_hook(frozen.before),
                norm.register_forward_hook(frozen.after, always_call=True),
            )


def thaw_statistics(model: nn.Module) -> None:
    """Let all norms of a model gather statistics again."""
    for norm in model.modules():
        _thaw(norm)


def _thaw(norm: nn.Module) -> None:
    for handle in norm.__dict__.pop(HANDLES, ()):
        handle.remove()
