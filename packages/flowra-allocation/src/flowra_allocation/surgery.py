"""Change the rank of an update while it trains, and carry its optimiser and its averages over the change.

Each operation is one value of :mod:`flowra_allocation.changes` per factor (docs/methods.md, section 8):

- :func:`keep`: directions that stay keep their moments;
- :func:`grow`: new directions leave the output as it is and start with a zero first moment and the mean second moment,
  so that their first step is no larger than the others' (a zero second moment would give about 3 times the learning
  rate); :func:`append` does the same with triplets of given values;
- :func:`rebase`: factors A' = T_A A, B' = B T_B carry the first moment as gradients transform, m_A' = T_Bᵀ m_A and
  m_B' = m_B T_Aᵀ, and take the mean as second moment.

Gradients that are there (between the micro-batches of an accumulated step) are carried as first moments are: what new
directions missed of the step stays zero. Where the update has slots, its Parameters and the optimiser's groups stay
what they are. Other Parameters that come and go with the rank (the magnitude of DoRA is there at rank ≥ 1) enter the
group of B, and leave it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.changes import Change, Grown, Kept, Overwritten, Rebased
from flowra_allocation.forms import RANK_AXIS, AnyLayer, factors, has_slots, has_triplets, live_slots
from flowra_allocation.optimizer_state import adopt, carry_over, check_optimizer, release
from flowra_allocation.sharding import sharded_like, whole, write
from flowra_allocation.wrapping import refuse_new_parameters

__all__ = ["append", "grow", "keep", "rebase", "silence"]

Changes = Mapping[str, Change]


def keep(
    layer: AnyLayer, indices: Sequence[int], optimizer: Optimizer | None = None, *, averages: Sequence[AnyLayer] = ()
) -> None:
    """Keep the directions with these indices, in this order; they keep their moments.

    Args:
        layer: to change.
        indices: of directions, distinct.
        optimizer: holds the layer's factors; None if they are not being trained.
        averages: running averages of the same update (of an EMA of the model), changed alike.
    """
    if has_slots(layer):  # nothing the optimiser holds changes
        _check_averages(layer, averages)
        layer.shrink(indices)
        _mirror(layer, averages, {})
        return
    refuse_new_parameters(layer)
    index = torch.tensor(list(indices), dtype=torch.long, device=layer.lora_A.device)
    changes = {name: Kept(RANK_AXIS[name], index) for name in factors(layer)}
    values = {name: changes[name].value(each.detach()) for name, each in factors(layer).items()}
    _change(layer, lambda: _install(layer, values), lambda _: changes, optimizer, averages)


def grow(
    layer: AnyLayer, rows: Tensor, optimizer: Optimizer | None = None, *, averages: Sequence[AnyLayer] = ()
) -> None:
    """Append ``rows`` ``(k, n)`` to A; the update does not change.

    A pair gets zero columns in B. Triplets get E = 0 and make rows and columns as long as those that are there
    (their own ``grow``).

    Args:
        layer: to change.
        rows: input sides of the new directions.
        optimizer: as for :func:`keep`.
        averages: as for :func:`keep`.
    """
    before = live_slots(layer)

    def install() -> None:
        if has_triplets(layer):
            layer.grow(rows)
        else:
            a, b = layer.lora_A.detach(), layer.lora_B.detach()
            new_columns = b.new_zeros(len(b), len(rows))
            _install(layer, {"lora_A": torch.cat([a, rows.to(a)]), "lora_B": torch.cat([b, new_columns], 1)})

    _change(layer, install, lambda new: _appended(layer, before, new), optimizer, averages)


def append(
    layer: AnyLayer,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    optimizer: Optimizer | None = None,
    *,
    averages: Sequence[AnyLayer] = (),
) -> None:
    """Append triplets with exactly these values; the update does not change where E is zero.

    Args:
        layer: to change.
        lora_A: rows ``(k, n)``.
        lora_E: ``(k,)``.
        lora_B: columns ``(m, k)``.
        optimizer: as for :func:`keep`.
        averages: as for :func:`keep`.

    Raises:
        TypeError: if the update has no E.
    """
    if not has_triplets(layer):
        raise TypeError(f"layer must be of triplets to append one, got {type(layer).__name__}. Grow it by rows.")
    before, values = live_slots(layer), {"lora_A": lora_A, "lora_E": lora_E, "lora_B": lora_B}

    @torch.no_grad()
    def install() -> None:
        layer.grow(torch.ones_like(lora_A))  # it makes room in its own way
        index = torch.tensor(live_slots(layer)[len(before) :], dtype=torch.long, device=layer.lora_A.device)
        for name, each in factors(layer).items():
            old = whole(each.detach())
            write(each, old.index_copy(RANK_AXIS[name], index, values[name].to(old)))

    _change(layer, install, lambda new: _appended(layer, before, new), optimizer, averages)


def rebase(
    layer: AnyLayer,
    lora_A: Tensor,
    lora_B: Tensor,
    optimizer: Optimizer | None = None,
    *,
    averages: Sequence[AnyLayer] = (),
) -> None:
    """Install factors that span a subspace of the old ones' (a truncation, a change of basis, or both).

    Args:
        layer: a pair.
        lora_A: ``(k, n)``, rows in the span of the old rows.
        lora_B: ``(m, k)``, columns in the span of the old columns.
        optimizer: as for :func:`keep`.
        averages: as for :func:`keep`.

    Raises:
        TypeError: if the update has an E.
    """
    if has_triplets(layer):
        raise TypeError(
            f"layer must be a pair to be re-based, got {type(layer).__name__}. Keep some of its directions."
        )
    refuse_new_parameters(layer)
    a, b = (each.detach().to(torch.float64) for each in (layer.lora_A, layer.lora_B))
    to_A = lora_A.to(a) @ torch.linalg.pinv(a)  # T_A, (k, r)
    to_B = torch.linalg.pinv(b) @ lora_B.to(b)  # T_B, (r, k)
    size = len(lora_A)
    changes = {
        "lora_A": Rebased(0, size, lambda old: to_A.to(old.device) @ old, lambda old: to_B.T.to(old.device) @ old),
        "lora_B": Rebased(1, size, lambda old: old @ to_B.to(old.device), lambda old: old @ to_A.T.to(old.device)),
    }
    _change(
        layer,
        lambda: _install(layer, {"lora_A": lora_A.to(layer.lora_A), "lora_B": lora_B.to(layer.lora_B)}),
        lambda _: changes,
        optimizer,
        averages,
    )


@torch.no_grad()
def silence(layer: AnyLayer, indices: Sequence[int]) -> None:
    """Set E of these directions to zero; they stay, and what the optimiser holds stays with them.

    Raises:
        TypeError: if the update has no E.
    """
    if not has_triplets(layer):
        raise TypeError(f"layer must be of triplets to silence directions, got {type(layer).__name__}")
    slots = live_slots(layer)
    index = torch.tensor([slots[each] for each in indices], dtype=torch.long, device=layer.lora_E.device)
    write(layer.lora_E, whole(layer.lora_E.detach()).index_fill(0, index, 0))


def _change(
    layer: AnyLayer,
    install: Callable[[], None],
    changes: Callable[[Mapping[str, nn.Parameter]], Changes],
    optimizer: Optimizer | None,
    averages: Sequence[AnyLayer],
) -> None:
    """Check, install, carry over: the order that leaves everything as it was if something is refused."""
    refuse_new_parameters(layer)
    old, others = factors(layer), _others(layer)
    _check_averages(layer, averages)
    if optimizer is not None:
        check_optimizer(optimizer, old.values())
    gradients = {name: each.grad for name, each in old.items() if each.grad is not None}
    install()
    new = factors(layer)
    made = changes(new)
    if optimizer is not None:
        for name, parameter in old.items():
            carry_over(optimizer, parameter, new[name], made[name])
        _follow(optimizer, others, _others(layer), beside=new["lora_B"])
    for name, gradient in gradients.items():
        new[name].grad = sharded_like(made[name].first(whole(gradient)), new[name])
    _mirror(layer, averages, made)


def _others(layer: AnyLayer) -> dict[str, nn.Parameter]:
    """Return the Parameters of an update that are not counted by directions."""
    held = dict(layer.named_parameters()) if isinstance(layer, nn.Module) else {}
    return {name: each for name, each in held.items() if name not in RANK_AXIS}


def _follow(
    optimizer: Optimizer, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter], *, beside: nn.Parameter
) -> None:
    """Let the optimiser hold the other Parameters of the update that are there now, and no more."""
    for name, parameter in old.items():
        if new.get(name) is not parameter:
            release(optimizer, parameter)
    for name, parameter in new.items():
        if old.get(name) is not parameter:
            adopt(optimizer, parameter, name=name, beside=beside)


def _check_averages(layer: AnyLayer, averages: Sequence[AnyLayer]) -> None:
    """Refuse averages that cannot be changed as the update is.

    Raises:
        ValueError: if one does not have the shapes of the update.
    """
    shapes = {name: tuple(each.shape) for name, each in factors(layer).items()}
    for average in averages:
        found = {name: tuple(each.shape) for name, each in factors(average).items()}
        if found != shapes or has_slots(average) != has_slots(layer):
            raise ValueError(
                f"averages must have the factors of the layer, {shapes}, got {found}. Average the model with its"
                " adapters, and hand the averages over at every change."
            )


def _appended(layer: AnyLayer, before: Sequence[int], new: Mapping[str, nn.Parameter]) -> Changes:
    """Say what it is to a factor that the layer now has directions behind those in the slots ``before``."""
    device = layer.lora_A.device
    index, live = (
        torch.tensor(slots, dtype=torch.long, device=device) for slots in (live_slots(layer)[len(before) :], before)
    )
    entries = {name: whole(each.detach()).index_select(RANK_AXIS[name], index) for name, each in new.items()}
    if has_slots(layer):
        return {name: Overwritten(RANK_AXIS[name], index, live, each) for name, each in entries.items()}
    return {name: Grown(RANK_AXIS[name], each) for name, each in entries.items()}


def _install(layer: AnyLayer, values: Mapping[str, Tensor]) -> None:
    replace = cast(Callable[..., None], layer.replace_factors)  # with E or without
    replace(**values)


def _mirror(layer: AnyLayer, averages: Sequence[AnyLayer], changes: Changes) -> None:
    """Change running averages of the update as the update was changed."""
    for average in averages:
        values = {name: changes[name].value(whole(each.detach())) for name, each in factors(average).items() if changes}
        if not has_slots(layer):
            _install(average, values)
            continue
        assert has_slots(average)
        average.mask.copy_(layer.mask)
        average.order.copy_(layer.order)
        for name, value in values.items():
            write(factors(average)[name], value)
