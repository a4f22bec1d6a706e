"""What an optimiser remembers of a Parameter, carried to the Parameter that takes its place.

The new Parameter stands where the old one stood in its parameter group, so learning rate, weight decay and every
scheduler stay. What is remembered is mapped by what it is: see :mod:`flowra_allocation.changes`.
"""

from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.changes import Change

__all__ = ["carry_over", "check_optimizer", "holds"]

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


def holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is in one of the optimiser's groups."""
    return any(parameter is held for group in optimizer.param_groups for held in group["params"])


def check_optimizer(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Refuse, before anything is changed, an optimiser that lacks the parameter or whose state is not understood.

    A frozen parameter (A of LoRA-FA) need not be held.

    Raises:
        ValueError: if it does, or is not.
    """
    if parameter.requires_grad and not holds(optimizer, parameter):
        raise ValueError("optimizer must hold the layer's factors, got one that does not. Build it after attaching.")
    unknown = [
        key
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.ndim > 0 and key not in FIRST_MOMENTS | SECOND_MOMENTS
    ]
    if unknown:
        raise ValueError(
            f"optimizer state must be moments of AdamW or SGD, got {unknown} in {type(optimizer).__name__}"
        )


def carry_over(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, change: Change) -> None:
    """Put ``new`` in the place of ``old`` (they may be one), with what the optimiser remembers mapped by the change."""
    for group in optimizer.param_groups:
        group["params"] = [new if held is old else held for held in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or old.numel() == 0:  # nothing to carry: the new factor starts with a fresh state
        return
    optimizer.state[new] = {key: _mapped(key, value, change) for key, value in state.items()}


def _mapped(key: str, value: object, change: Change) -> object:
    if not isinstance(value, Tensor):
        return value
    if key in FIRST_MOMENTS:
        return change.first(value)
    return change.second(value, change.axis) if key in SECOND_MOMENTS else value
