"""Weights for a merge, learned on unlabelled examples: those that make the merged model sure of its answers.

The model W₀ + Σᵢ λᵢ ΔWᵢ is asked about examples of every task, and λ, one number for each task or for each task and
module, minimises the mean entropy of its predictions, which the paper finds to rise and fall with the loss. Adapters,
base and heads stay as they are. The λ that come out are the weights of an ordinary merge: ``task_arithmetic`` is what
was learned.

Nothing of the model is replaced: it is called with other tensors in the place of its parameters
(``torch.func.functional_call``), so it may be any module, of any layers. W₀ + B diag(λ) A is made from the stacked
factors of a module, so memory holds one merged weight for each module, whatever the number of tasks.

Source: Yang et al. 2023, *AdaMerging* (arXiv:2310.02575), task-wise and layer-wise. ``docs/methods.md``, section 25.
Deviations: λ starts at 1/T (0.3 in the authors' code); after each step it is put back into its bounds, where that code
clamps it in the forward pass, so that outside of [0, 1] it has no gradient; the loss is the mean over tasks, which for
Adam is as good as their sum; a layer is a module that is adapted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import Weight

__all__ = ["LearnedCoefficients", "MergedModel", "learn_coefficients", "prediction_entropy"]

Batch = TypeVar("Batch")
Call = Callable[..., Any]
"""The model, with other weights; what it takes and gives is the model's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedCoefficients:
    """What was learned, and how it went."""

    weights: tuple[Weight, ...]
    """λᵢ for each task: a number, or one by the name of each module that the task updates. The weights of a merge."""
    entropies: tuple[float, ...]
    """The mean prediction entropy before each step, in nats, of the batches that it saw."""


def learn_coefficients(
    model: nn.Module,
    updates: Sequence[Mapping[str, LowRankUpdate]],
    batches: Sequence[Sequence[Batch]],
    logits: Callable[[Call, Batch, int], Tensor],
    *,
    per: Literal["task", "module"] = "module",
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    fan_in_fan_out: bool = False,
    initial: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    learning_rate: float = 1e-3,
    steps: int = 500,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> LearnedCoefficients:
    """Learn the weight of every adapter in a merge, from batches without labels.

    Args:
        model: the base, in evaluation mode, without adapters. It is not changed: no parameter, buffer or gradient.
        updates: one mapping from module name to update for each task.
        batches: for each task the batches to learn from, at least one. Each step draws one of every task.
        logits: given the merged model as a callable, a batch and the index of its task, returns the scores of classes,
            ``(…, classes)``, on the task's examples. It may add a head of its own.
        per: ``task`` for one λ for each task, ``module`` for one for each task and module.
        heads: for each task tensors that stand in for the model's of that name, as ``AdapterState.modules_to_save``;
            their shapes may differ from the model's.
        fan_in_fan_out: whether linear layers other than ``nn.Linear`` store their weight as (in, out), as GPT-2's do.
        initial: λ at the start, within the bounds; 1/T by default.
        bounds: smallest and largest λ. Entropy falls with the size of logits, too: unbounded, λ may grow for that.
        learning_rate: of Adam, > 0; about the largest change of a λ in one step.
        steps: ≥ 1. Rate and steps are by default those of the authors' code.
        seed: of the draws of batches. Equal seeds give equal coefficients, where the model is deterministic.
        progress: told after each step its number, from 1, and the mean entropy before it.

    Returns:
        The coefficients after the last step, and the entropies.

    Raises:
        ValueError: if a setting is out of range, the model is in training mode, an update does not fit a parameter of
            the model, logits have fewer than two classes or no gradient, or an entropy is not finite.
    """
    _check(model, updates, batches, heads, initial=initial, bounds=bounds, learning_rate=learning_rate, steps=steps)
    merged = MergedModel(model, updates, fan_in_fan_out=fan_in_fan_out)
    tasks, names = len(updates), merged.names
    columns = len(names) if per == "module" else 1
    start = 1 / tasks if initial is None else initial
    coefficients = torch.full((tasks, columns), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    entropies = []
    for step in range(1, steps + 1):
        gradient, total = torch.zeros_like(coefficients), 0.0
        for task in range(tasks):  # one after the other, so that memory holds the activations of one
            batch = batches[task][int(torch.randint(len(batches[task]), (), generator=generator))]
            call = merged.with_coefficients(coefficients, heads[task] if heads else {})
            entropy = prediction_entropy(logits(call, batch, task)) / tasks
            if not entropy.requires_grad:
                raise ValueError(f"logits must come from the merged model, with gradients, got none for task {task}")
            if not torch.isfinite(entropy):
                raise ValueError(
                    f"entropy must be finite, got {float(entropy.detach())} for task {task} at step {step}."
                    " Look at the logits; lower the learning rate or tighten the bounds."
                )
            gradient += torch.autograd.grad(entropy, coefficients)[0]
            total += float(entropy.detach())
        coefficients.grad = gradient
        optimizer.step()
        with torch.no_grad():
            coefficients.clamp_(*bounds)
        entropies.append(total)
        if progress is not None:
            progress(step, total)
    values: list[list[float]] = coefficients.expand(tasks, len(names)).tolist()
    weights: list[Weight] = [
        {name: value for name, value in zip(names, row, strict=True) if name in one} if per == "module" else row[0]
        for one, row in zip(updates, values, strict=True)
    ]
    return LearnedCoefficients(weights=tuple(weights), entropies=tuple(entropies))


def prediction_entropy(logits: Tensor) -> Tensor:
    """Return the mean of -Σ p log p over predictions, in nats, computed in at least float32.

    Args:
        logits: ``(…, classes)``, finite, at least two classes.

    Raises:
        ValueError: if there are fewer than two classes, or no prediction.
    """
    if logits.ndim == 0 or logits.shape[-1] < 2 or not logits.numel():
        raise ValueError(f"logits must be (…, classes) with at least two classes, got {tuple(logits.shape)}")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class MergedModel:
    """A model with W₀ + Σᵢ λᵢ ΔWᵢ in the place of its weights, as a differentiable function of λ.

    Args:
        model: the base; its tensors are read and never written, and get no gradient.
        updates: one mapping from module name to update for each task.
        fan_in_fan_out: as for :func:`learn_coefficients`.

    Raises:
        ValueError: if an update does not fit a parameter of the model.
    """

    def __init__(
        self, model: nn.Module, updates: Sequence[Mapping[str, LowRankUpdate]], *, fan_in_fan_out: bool
    ) -> None:
        self.names = sorted({name for one in updates for name in one})
        """The modules that a task updates, in the order of the columns of λ."""
        self._model = model
        self._base = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._places = [_Place.of(model, updates, name, fan_in_fan_out=fan_in_fan_out) for name in self.names]
        taken: dict[str, str] = {}
        for place in self._places:
            if taken.setdefault(place.parameter, place.name) != place.name:
                both = f"{taken[place.parameter]!r} and {place.name!r} of {place.parameter!r}"
                raise ValueError(f"updates must be of parameters that no other module shares, got {both}")

    def with_coefficients(self, coefficients: Tensor, head: Mapping[str, Tensor]) -> Call:
        """Return the model as a callable, at some λ.

        Args:
            coefficients: λ, ``(T, 1)`` or ``(T, modules)``, columns as in ``names``; its dtype and device are its own.
            head: tensors that stand in for the model's.
        """
        columns = coefficients.expand(-1, len(self.names)).unbind(1)
        weights = {
            place.parameter: place.merged(self._base[place.parameter], column)
            for place, column in zip(self._places, columns, strict=True)
        }
        tensors = {**self._base, **weights, **{name: tensor.detach() for name, tensor in head.items()}}

        def call(*args: object, **kwargs: object) -> Any:  # noqa: ANN401 - whatever the model returns
            return functional_call(self._model, tensors, args, kwargs)

        return call


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Place:
    """The updates of all tasks at one parameter, stacked along the rank."""

    name: str
    parameter: str
    a: Tensor
    b: Tensor
    task: Tensor
    """The task of each row of A and column of B."""
    update: LowRankUpdate
    """One of them, for its layout."""
    transposed: bool

    @classmethod
    def of(
        cls, model: nn.Module, updates: Sequence[Mapping[str, LowRankUpdate]], name: str, *, fan_in_fan_out: bool
    ) -> "_Place":
        given = [(task, one[name]) for task, one in enumerate(updates) if name in one]
        first = given[0][1]
        forms = sorted({f"{update.layout} {update.parameter_shape}" for _, update in given})
        key = name if first.layout == "vector" else f"{name}.weight"
        named = dict(model.named_parameters(remove_duplicate=False))
        parameter = named.get(key)
        owner = model.get_submodule(key.rpartition(".")[0]) if parameter is not None else None
        may_be = fan_in_fan_out or type(owner).__name__ == "Conv1D"  # PEFT's note is false beside an nn.Linear
        transposed = may_be and first.layout == "linear" and not isinstance(owner, nn.Linear)
        shape = first.parameter_shape[::-1] if transposed else first.parameter_shape
        if len(forms) > 1 or parameter is None or tuple(parameter.shape) != shape or not parameter.is_floating_point():
            got = "none" if parameter is None else f"{parameter.dtype} {tuple(parameter.shape)}"
            raise ValueError(
                f"updates must be of one shape, that of a floating parameter of the model, got {' and '.join(forms)}"
                f" for {key!r}, which is {got}. Give the base model, not quantised, with the names that adapters use."
            )
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return cls(
            name=name,
            parameter=next(one for one, tensor in model.named_parameters() if tensor is parameter),
            a=torch.cat([update.lora_A.detach().to(parameter.device, dtype) for _, update in given]),
            b=torch.cat(
                [update.scaling * update.lora_B.detach().to(parameter.device, dtype) for _, update in given], dim=1
            ),
            task=torch.cat([torch.full((update.rank,), task) for task, update in given]),
            update=first,
            transposed=transposed,
        )

    def merged(self, base: Tensor, coefficients: Tensor) -> Tensor:
        """Return W₀ + Σᵢ λᵢ ΔWᵢ as the parameter lies, for λ ``(T,)``."""
        scale = coefficients[self.task.to(coefficients.device)].to(self.b.dtype).to(self.b.device)
        delta = (self.b * scale) @ self.a
        if self.transposed or self.update.layout == "embedding":
            delta = delta.T
        return (base + delta.reshape(base.shape)).to(base.dtype)


def _check(
    model: nn.Module,
    updates: Sequence[Mapping[str, LowRankUpdate]],
    batches: Sequence[Sequence[Batch]],
    heads: Sequence[Mapping[str, Tensor]] | None,
    *,
    initial: float | None,
    bounds: tuple[float, float],
    learning_rate: float,
    steps: int,
) -> None:
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode. Call model.eval().")
    if not updates or not any(updates):
        raise ValueError("updates must hold at least one module of one task, got none")
    if len(batches) != len(updates) or not all(len(one) for one in batches):
        got = [len(one) for one in batches]
        raise ValueError(f"batches must be at least one for each of {len(updates)} tasks, got {got}")
    if heads is not None:
        if len(heads) != len(updates):
            raise ValueError(f"heads must be one for each of {len(updates)} tasks, got {len(heads)}")
        unknown = sorted({name for head in heads for name in head} - model.state_dict().keys())
        if unknown:
            raise ValueError(f"heads must name parameters or buffers of the model, got {unknown}")
    low, high = bounds
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"bounds must be two finite numbers, the smaller one first, got {bounds}")
    start = 1 / len(updates) if initial is None else initial
    if not low <= start <= high:
        raise ValueError(f"initial must be within bounds {bounds}, got {start}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be a number > 0, got {learning_rate}")
    if steps < 1:
        raise ValueError(f"steps must be ≥ 1, got {steps}")
