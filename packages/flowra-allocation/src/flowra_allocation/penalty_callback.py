"""A penalty on parameters inside ``transformers.Trainer``.

This file is the same in flowra-allocation and flowra-compose (docs/decisions, 0014).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["PenaltyCallback"]


class PenaltyCallback(TrainerCallback):
    """Add the gradient of a penalty on the parameters before each step of the optimiser.

    It acts as a penalty in the loss, but once for each step however many batches are accumulated, and outside the
    forward pass: no hook of ``DistributedDataParallel`` fires, and the loss that is logged is without it. The Trainer
    has clipped the loss's gradient by then; the penalty's is not clipped.

    Args:
        penalty: returns the penalty, a scalar that depends on trained parameters, such as
            ``lambda: 0.1 * orthogonality(adapters(model).values())``. A zero that depends on none is taken as it is:
            there may be no directions now, or no past task yet.

    Raises:
        ValueError: at the beginning, if gradients would be unscaled after the penalty (``fp16`` without clipping);
            before a step, if the penalty is not a scalar, or is a constant.
    """

    def __init__(self, penalty: Callable[[], Tensor]) -> None:
        self._penalty = penalty

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refuse what would scale the penalty down."""
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "max_grad_norm must be > 0 with fp16 and a penalty, got 0: gradients would still be scaled when the"
                " penalty's is added. Clip at a large norm."
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Add the gradient to ``.grad``."""
        assert model is not None
        with torch.enable_grad():
            penalty = self._penalty()
        if penalty.numel() != 1 or (not penalty.requires_grad and penalty.item() != 0):
            raise ValueError(f"penalty must be a scalar that depends on trained parameters, got {penalty}")
        if not penalty.requires_grad:
            return
        parameters = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
            elif gradient is not None:
                parameter.grad = gradient
