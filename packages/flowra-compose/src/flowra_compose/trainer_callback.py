"""Sequential learning inside ``transformers.Trainer`` (extra ``flowra-compose[transformers]``).

The Trainer calls ``on_pre_optimizer_step`` once for each step, when all micro-batches have been accumulated and
clipped, then the optimiser, then ``on_optimizer_step``; only after that it saves. So every checkpoint holds an A, and a
first moment, that are off the memory already, and a resumed run needs nothing but the memory that it began with::

    memory = read_task_memory(folder)
    space = NullSpace(layers, memory)
    space.start()  # not when resuming: it would be overwritten by the checkpoint
    trainer = Trainer(model, args, callbacks=[NullSpaceCallback(space, also_trained=head.parameters())], ...)
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_compose.null_space import NullSpace

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:  # an optional dependency: say how to get it
    raise ImportError("NullSpaceCallback needs transformers: pip install 'flowra-compose[transformers]'") from error

__all__ = ["NullSpaceCallback", "PenaltyCallback"]


class NullSpaceCallback(TrainerCallback):
    """Project after each step of the optimiser.

    Args:
        space: of the layers that are trained, and started.
        also_trained: other parameters that may be trained, such as the new task's own head.

    Raises:
        ValueError: at the beginning, if an A is not off the memory, a layer is not part of the model, or anything else
            is trained; at the first step, if the optimiser's state is not understood.
    """

    def __init__(self, space: NullSpace, *, also_trained: Iterable[nn.Parameter] = ()) -> None:
        self._space = space
        self._also_trained = tuple(also_trained)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Refuse training that would not leave past tasks alone."""
        assert model is not None
        self._space.check_alone(model, self._also_trained)
        self._space.check()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Project A and its first moment."""
        assert optimizer is not None
        self._space.after_step(optimizer)


class PenaltyCallback(TrainerCallback):
    """Add the gradient of a penalty before each step of the optimiser.

    It acts as the penalty in the loss would, once for each step however many batches are accumulated. The loss that is
    logged is without it, and the Trainer, which has clipped the loss's gradient by then, does not clip it. A class of
    this name in ``flowra_allocation`` does the same.

    Args:
        penalty: returns a scalar that depends on trained parameters, such as
            ``lambda: 0.5 * o_lora_penalty(layers, memory)``; or a zero that depends on none, before the first task has
            ended.

    Raises:
        ValueError: at the beginning, if gradients would be unscaled after the penalty (``fp16`` without clipping);
            before a step, if the penalty is not a scalar, or another constant than 0.
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
        trained = [each for each in model.parameters() if each.requires_grad]
        for parameter, gradient in zip(trained, torch.autograd.grad(penalty, trained, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
