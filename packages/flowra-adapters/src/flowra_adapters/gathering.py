"""From the adapters on a model to values in PEFT's layout.

A module gets one pair of factors, whatever lies on it: updates of its parts stand below each other in A, and in their
rows of B.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.applying import adapter_dicts
from flowra_adapters.attach import adapters
from flowra_adapters.checkpoint import AdapterCheckpoint, Kind, own_copy
from flowra_adapters.convert import Converted, exact, own_factors, to_lora
from flowra_adapters.dora import DoRA
from flowra_adapters.layers import is_conv1d
from flowra_adapters.lora import LoRA
from flowra_adapters.operators import CONVOLUTIONS, EmbeddingOperator, ParameterOperator
from flowra_adapters.peft_layout import Consumer, at_most_max_rank, obstacle, to_peft
from flowra_adapters.sites import Site
from flowra_adapters.weights import base_weight

__all__ = ["checkpoint_of", "is_plain"]


def is_plain(model: nn.Module, *, adapter: str = "default") -> bool:
    """Tell whether PEFT's files say all of an adapter: after reading them, it is what it was.

    Returns:
        True for LoRA, or DoRA everywhere, on whole layers that PEFT computes rightly, without a residual start.
    """
    live = [(site, one) for _, _, site, one in _each(model, adapter)]
    with_magnitude = {isinstance(one, DoRA) for _, one in live if one.rank > 0}
    return len(with_magnitude) < 2 and all(
        type(one) in (LoRA, DoRA)
        and one.offset_A is None
        and site.part is None
        and not isinstance(site.operator, ParameterOperator)
        and obstacle(site.operator, consumer="peft", magnitude=isinstance(one, DoRA)) is None
        for site, one in live
    )


def checkpoint_of(
    model: nn.Module,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    consumer: Consumer = "peft",
    rank: int | None = None,
    energy: float | None = None,
) -> AdapterCheckpoint:
    """Read the named adapter off a model, as LoRA or DoRA in PEFT's layout.

    Exact are LoRA with or without a residual start, the SVD form, Tucker, DoRA for PEFT, updates of parts of a weight
    and of single experts, and offsets of biases. Everything else is cut to ``rank`` or ``energy``, if one is given. If
    some modules have DoRA and others do not, these get the magnitude they have now.

    Args:
        model: is not changed.
        adapter: name of the set.
        modules_to_save: names of modules trained in full.
        base_model_name_or_path: for the reader.
        task_type: for the reader.
        consumer: who reads, which decides what can be said: ``peft``, ``peft_merged`` (PEFT that merges the adapter
            before it is used) or ``vllm``, which has no DoRA.
        rank: see :func:`to_lora`; only what is not LoRA is cut.
        energy: likewise.

    Returns:
        Its values; the tensors are copies, on the CPU. Errors of what was cut are in ``errors``.

    Raises:
        ValueError: if no such adapter is attached, a module to save does not exist, or the consumer would compute
            something else.
        TypeError: if an adapter is of a method that is not LoRA, and neither ``rank`` nor ``energy`` is given.
    """
    adapters(model, adapter)  # it must be there
    targets: dict[str, _Target] = {}
    biases: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for module, held, site, one in _each(model, adapter):
        if one.rank == 0:
            continue
        if site.parameter == "bias" and isinstance(site.operator, ParameterOperator) and site.host is site.owner:
            bias = base_weight(held, site)
            biases[f"{module}.bias"] = own_copy((bias + one.delta_weight(bias)).to(bias.dtype))
            continue
        name = site.name_at(module)
        keeps_magnitude = isinstance(one, DoRA) and consumer != "vllm"
        reason = obstacle(site.operator, consumer=consumer, magnitude=keeps_magnitude)
        if reason:
            raise ValueError(f"adapter must be one that its consumer applies as here, got one at {name!r}: {reason}")
        place, kind = _place(module, site, name)
        piece = _piece(name, held, site, one, rank=rank, energy=energy, keeps_magnitude=keeps_magnitude)
        if piece.update.error > 0:
            errors[name] = piece.update.error
        targets.setdefault(place, _Target(place, kind)).pieces.append(piece)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scalings: dict[str, float] = {}
    for target in targets.values():
        factors[target.name] = target.factors()
        scalings[target.name] = target.scaling
    magnitudes = {}
    if any(piece.magnitude is not None for target in targets.values() for piece in target.pieces):
        magnitudes = {name: own_copy(target.magnitude()) for name, target in targets.items()}
    saved = {}
    trained = tuple(modules_to_save)
    for module_name in trained:
        for tensor_name, tensor in model.get_submodule(module_name).state_dict().items():
            saved[f"{module_name}.{tensor_name}"] = own_copy(tensor)
    return AdapterCheckpoint(
        factors={name: (own_copy(a), own_copy(b)) for name, (a, b) in factors.items()},
        scalings=scalings,
        kinds={name: target.kind for name, target in targets.items() if target.kind is not None},
        magnitudes=magnitudes,
        biases=biases,
        modules_to_save=saved,
        trained_modules=trained,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        fan_in_fan_out=any(
            is_conv1d(model.get_submodule(name)) for name, target in targets.items() if target.kind is None
        ),
        errors=errors,
    )


def _each(model: nn.Module, adapter: str) -> list[tuple[str, AdapterDict, Site, Adapter]]:
    """List the adapters of a set with the names that their modules have now, what hangs on these, and the sites."""
    return [
        (module, held, held.sites[key], one)
        for module, held in adapter_dicts(model).items()
        for key, one in held.named(adapter).items()
    ]


def _place(module: str, site: Site, name: str) -> tuple[str, Kind | None]:
    """Tell where PEFT keeps a site's factors: name and kind."""
    if isinstance(site.host, nn.MultiheadAttention):
        if site.parameter == "in_proj_weight":
            return module, "attention"
        if site.owner is site.host.out_proj and site.parameter == "weight":
            raise ValueError(
                f"adapter must be one that its consumer applies as here, got one at {name!r}: PEFT adds the update of"
                " an attention block's out_proj twice. Save it without a consumer."
            )
    elif isinstance(site.operator, EmbeddingOperator):
        return module, "embedding"
    elif not isinstance(site.operator, ParameterOperator):
        return module, None
    elif len(site.operator.shape) == 2 and module and not isinstance(site.owner, CONVOLUTIONS):
        return f"{module}.{site.parameter}", "parameter"
    raise ValueError(
        f"adapter must be at a place that PEFT has, got one of the parameter {site.parameter!r} at {name!r}. Save it"
        f" without a consumer."
    )


@dataclass(frozen=True)
class _Piece:
    """The update of one site, in our layout."""

    held: AdapterDict
    site: Site
    update: Converted
    magnitude: Tensor | None = None


def _piece(
    name: str,
    held: AdapterDict,
    site: Site,
    one: Adapter,
    *,
    rank: int | None,
    energy: float | None,
    keeps_magnitude: bool,
) -> _Piece:
    if keeps_magnitude:
        assert isinstance(one, DoRA)
        assert one.lora_magnitude is not None
        return _Piece(held, site, own_factors(one), one.lora_magnitude.detach())
    own = exact(one)
    if not own and rank is None and energy is None:
        raise TypeError(
            f"adapter must be LoRA to be written in PEFT's format, got {type(one).__name__} at {name!r}. Give a rank or"
            f" an energy to write what is nearest to it, or save it without a consumer."
        )
    weight = site.operator.to_standard(base_weight(held, site)) if one.reads_base else None
    found = to_lora(one, weight) if own else to_lora(one, weight, rank=rank, energy=energy)
    return _Piece(held, site, found)


@dataclass
class _Target:
    """What becomes one pair of factors."""

    name: str
    kind: Kind | None
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def scaling(self) -> float:
        """The scaling that all pieces have; 1 if they differ, and theirs are multiplied into B."""
        found = {piece.update.scaling for piece in self.pieces}
        return found.pop() if len(found) == 1 else 1.0

    def own(self) -> list[tuple[_Piece, Tensor, Tensor]]:
        """Return the pieces with their factors at the common scaling."""
        return [
            (piece, piece.update.lora_A, piece.update.lora_B * (piece.update.scaling / self.scaling))
            for piece in self.pieces
        ]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Make the factors in PEFT's layout."""
        if self.kind == "parameter":
            return _by_matrix(self.own())
        whole = self.pieces[0].site.whole
        return to_peft(whole, *_stacked(self.own(), whole.out_size))

    def magnitude(self) -> Tensor:
        """Return μ of all rows: where there is no DoRA, ‖W_i + ΔW_i‖, so that the update is what it is."""
        whole = self.pieces[0].site.whole
        if self.kind in ("attention", "parameter"):
            raise ValueError(f"adapter must be LoRA everywhere or DoRA everywhere here, got {self.name!r} beside DoRA")
        if whole.groups > 1:
            raise ValueError(f"adapter must be one that PEFT has, got {self.name!r} beside DoRA, a grouped convolution")
        held, site = self.pieces[0].held, self.pieces[0].site
        weight = whole.to_standard(base_weight(held, Site(site.name, site.owner, site.parameter, site.host, whole)))
        lora_A, lora_B = _stacked(self.own(), whole.out_size)
        covered = torch.zeros(whole.out_size, dtype=torch.int64)
        update = self.scaling * whole.product(lora_B.double(), lora_A.double())
        magnitude: Tensor = (weight.double() + update).flatten(1).norm(dim=1)
        for piece in self.pieces:
            covered[_rows(piece)] += 1
        for piece in self.pieces:
            if piece.magnitude is not None:
                if (covered[_rows(piece)] > 1).any():
                    raise ValueError(
                        f"DoRA must be the only adapter of its rows here, got another one at {self.name!r}"
                    )
                magnitude[_rows(piece)] = piece.magnitude.double()
        return magnitude.to(lora_A.dtype)


def _rows(piece: _Piece) -> slice | list[int]:
    if piece.site.part is None:
        return slice(None)
    index = piece.site.part.index
    assert not isinstance(index, int)
    return index


def _stacked(own: list[tuple[_Piece, Tensor, Tensor]], m: int) -> tuple[Tensor, Tensor]:
    """Put the rows of A below each other, and each B into the rows of its part: the products add up."""
    if len(own) == 1 and own[0][0].site.part is None:
        return own[0][1:]
    lora_A = torch.cat([a for _, a, _ in own])
    lora_B = lora_A.new_zeros(m, len(lora_A))
    start = 0
    for piece, a, b in own:
        lora_B[_rows(piece), start : start + len(a)] = b.to(lora_B)
        start += len(a)
    return lora_A, lora_B


def _by_matrix(own: list[tuple[_Piece, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Make A ``(E, r, n)`` and B ``(E, m, r)``; matrices without an update have zeros.

    Returns:
        Both; of a module that says ``is_transposed``, where PEFT reads a stack as ``(E, n, m)``, the other way round.
    """
    own = [(piece, *at_most_max_rank(piece.site.operator, a, b)) for piece, a, b in own]
    site = own[0][0].site
    shape = site.whole.shape if len(site.whole.shape) == 3 else (1, *site.whole.shape)
    rank = max(len(a) for _, a, _ in own)
    lora_A = own[0][1].new_zeros(shape[0], rank, shape[2])
    lora_B = own[0][2].new_zeros(shape[0], shape[1], rank)
    for piece, a, b in own:
        index = 0 if piece.site.part is None else piece.site.part.index
        lora_A[index, : len(a)] = a.to(lora_A)
        lora_B[index, :, : len(a)] = b.to(lora_B)
    if len(site.whole.shape) == 3 and getattr(site.owner, "is_transposed", False):
        return lora_B.mT, lora_A.mT
    return lora_A, lora_B
