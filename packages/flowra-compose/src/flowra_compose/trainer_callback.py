"""Sequential learning inside ``transformers.Trainer`` (extra ``flowra-compose[transformers]``).

The Trainer calls ``on_pre_optimizer_step`` once for each step, when all micro-batches have been accumulated and
clipped, then the optimiser, then ``on_optimizer_step``; only after that it saves. So every checkpoint holds an A, and a
first moment, that are off the memory already, and a resumed run needs nothing but the memory that it began with::

    memory = read_task_memory(folder)
    space = NullSpace(layers, memory)
    space.start()  # not when resuming: it would be overwritten by the checkpoint
    trainer = Trainer(model, args, callbacks=[NullSpaceCallback(space, also_trained=head.parameters())], ...)
"""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from flowra_compose.null_space import NullSpace

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from flowra_compose.penalty_callback import PenaltyCallback
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
