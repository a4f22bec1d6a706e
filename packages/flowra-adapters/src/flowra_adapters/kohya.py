"""The files of kohya's sd-scripts and LyCORIS: one safetensors file for one or several models.

A module is called ``<prefix>_<path with dots as underscores>``: ``lora_unet`` and ``lora_te`` (``lora_te1``,
``lora_te2`` of SDXL) for the models of Stable Diffusion, ``lycoris`` for LyCORIS on any model. Its tensors:

    lora_down.weight    (r, n) or (r, n/g, *k)      with lora_mid (r, n/g, 1, …)
    lora_up.weight      (m, r) or (m, r, 1, …)
    lora_mid.weight     (r, r, *k)                  of a convolution in Tucker form
    alpha               ()
    dora_scale          (m, 1) or (m, 1, 1, …)

and mean ΔW = (alpha / r) · up down, as one matrix ``(m, n/g·∏k)`` whatever the groups, or
ΔW[o, i, …] = (alpha / r) Σ up[o, p] mid[p, q, …] down[q, i]; ``dora_scale`` is the length of each row of W + ΔW.

Measured on LyCORIS 4.1.3, which puts W + ΔW into the layer's own convolution, so that groups and dilation are right.
Readers that run the tensors as a chain of convolutions, kohya's own among them, know neither groups nor dilation, nor
``lora_mid`` and ``dora_scale``.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.applying import adapter_dicts
from flowra_adapters.attach import adapters, attach, delete
from flowra_adapters.checkpoint import DTYPES, is_odd, own_copy
from flowra_adapters.convert import exact, own_factors, to_lora
from flowra_adapters.dora import DoRA
from flowra_adapters.json_files import read_tensors
from flowra_adapters.lora import LoRA
from flowra_adapters.methods import AdapterMethod
from flowra_adapters.operators import ConvOperator, LinearOperator, Operator
from flowra_adapters.sites import Site, sites
from flowra_adapters.tucker_conv import TuckerConv
from flowra_adapters.tucker_ranks import TuckerRanks
from flowra_adapters.weights import base_weight
from flowra_adapters.whole_files import replacing

__all__ = ["load_kohya", "save_kohya"]

KEY = re.compile(r"([^.]+)\.(?:(lora_down|lora_up|lora_mid)\.weight|(alpha|dora_scale))")


def save_kohya(
    models: Mapping[str, nn.Module],
    file: str | Path,
    *,
    adapter: str = "default",
    rank: int | None = None,
    energy: float | None = None,
    rank_step: int = 1,
) -> dict[str, float]:
    """Write the named adapter of one or several models in kohya's format, at unit scale: s is in up, and alpha is r.

    Exact are LoRA with or without a residual start, the SVD form, DoRA of whole layers, updates of rows of a layer, and
    Tucker, which keeps its form where the kernel has more than one position. An update of rank r in each of g groups
    becomes one of rank min(g r, n/g·∏k, m). Everything else is cut to ``rank`` or ``energy``, if one is given.

    Args:
        models: prefix to model, such as ``{"lora_unet": unet, "lora_te": text_encoder}`` or ``{"lycoris": model}``.
        file: written under a temporary name, then renamed.
        adapter: name of the set, on every model.
        rank: see :func:`to_lora`; only what is not LoRA is cut.
        energy: likewise.
        rank_step: every rank is filled up with zeros to a multiple of this.

    Returns:
        Name in the file to the relative error ‖ΔW - s · B A‖_F / ‖ΔW‖_F of what was cut; empty if nothing was.

    Raises:
        ValueError: if there is nothing to write, a module's name in the file would mean another module, too, a layer is
            none that LyCORIS computes rightly, or the update does not fit its dtype.
        TypeError: if a method is not LoRA, and neither ``rank`` nor ``energy`` is given.
    """
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    known = _modules(models)
    for prefix, model in models.items():
        adapters(model, adapter)  # it must be there
        for module, held in adapter_dicts(model).items():
            live = {held.sites[key]: one for key, one in held.named(adapter).items() if one.rank > 0}
            if not live:
                continue
            name = _name(prefix, module)
            if len(known[name]) > 1:
                raise ValueError(f"names must mean one module each in the file, got {name!r} for {known[name]}")
            made = _written(module, held, live, rank=rank, energy=energy).padded(rank_step)
            if made.error > 0:
                errors[name] = made.error
            tensors |= {f"{name}.{key}": own_copy(tensor) for key, tensor in made.tensors().items()}
    if not tensors:
        raise ValueError("adapter must have at least one module of rank ≥ 1, got none")
    with replacing(Path(file)) as (partial,):
        save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})
    return errors


def load_kohya(
    models: Mapping[str, nn.Module],
    file: str | Path,
    *,
    adapter: str = "default",
    ignore: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, Adapter]]:
    """Attach what a file of kohya's sd-scripts or LyCORIS (LoRA, LoCon, with Tucker or DoRA) holds.

    A module without ``alpha`` has scale 1, as old files mean it. A convolution in Tucker form becomes a Tucker adapter
    where its rank fits its axes; else, and with ``dora_scale``, its tensors are multiplied into two.

    Args:
        models: prefix to model; changed in place, left as they were if anything does not fit.
        file: safetensors; nothing else is ever opened.
        adapter: name for the attached sets.
        ignore: prefixes of modules to leave out, such as ``lora_te`` where only the U-Net is at hand.
        dtype: of the adapters' tensors; by default the file's.

    Returns:
        Prefix to the attached adapters by site name; of the models that the file has something for.

    Raises:
        ValueError: if the file is damaged, or a tensor is not understood, not finite, belongs to no module or to
            several, or does not fit.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(f"file must be a .safetensors file, got {path}. Pickles are never opened; convert it first.")
    found = _sorted(read_tensors(path), tuple(f"{prefix}_" for prefix in ignore), path)
    known = _modules(models)
    places_of = {prefix: sites(model) for prefix, model in models.items()}
    made: dict[str, dict[str, Adapter]] = {}
    for name, tensors in found.items():
        places = known.get(name, [])
        if len(places) != 1:
            what = f"one of {[module for _, module in places]}" if places else "no module of these models"
            raise ValueError(f"names must mean one module each, got {name[:200]!r}, {what}; in {path}")
        ((prefix, module),) = places
        site = places_of[prefix].get(module)
        try:
            made.setdefault(prefix, {})[module] = _read(site, tensors, dtype)
        except ValueError as error:
            raise ValueError(f"{error}; for {name[:200]!r} in {path}") from None
    attached: dict[str, dict[str, Adapter]] = {}
    trainable = [(one, one.requires_grad) for prefix in made for one in models[prefix].parameters()]
    try:
        for prefix, group in made.items():
            attached[prefix] = _attach(models[prefix], group, adapter)
    except ValueError:
        for prefix in attached:
            delete(models[prefix], adapter)
        for one, before in trainable:
            one.requires_grad_(before)
        raise
    return attached


def _name(prefix: str, module: str) -> str:
    return f"{prefix}_{module}".replace(".", "_")


def _modules(models: Mapping[str, nn.Module]) -> dict[str, list[tuple[str, str]]]:
    """Map each name that a file can have to the prefixes and modules it can mean."""
    found: dict[str, list[tuple[str, str]]] = {}
    for prefix, model in models.items():
        if not prefix or not prefix.replace("_", "").isalnum():
            raise ValueError(f"prefixes must be letters, digits and underscores, got {prefix!r}")
        ours = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, AdapterDict))
        for module, each in model.named_modules():
            if module and not isinstance(each, AdapterDict) and not module.startswith(ours):
                found.setdefault(_name(prefix, module), []).append((prefix, module))
    return found


def _obstacle(site: Site) -> str | None:
    """Tell why LyCORIS would not compute a site's update rightly, or None if it does."""
    whole = site.whole
    if site.parameter != "weight":
        return f"these files have no place for the parameter {site.parameter!r}"
    if isinstance(whole, LinearOperator) and not whole.transposed:
        return None
    if isinstance(whole, ConvOperator) and not whole.transposed:
        wrong = whole.padding_mode != "zeros" and any(whole.pads)
        return f"LyCORIS ignores padding_mode={whole.padding_mode!r}" if wrong else None
    return f"LyCORIS does not adapt such a layer ({type(site.owner).__name__})"


@dataclass(frozen=True, kw_only=True)
class _Module:
    """What a file says of one module, at unit scale."""

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    dora_scale: Tensor | None = None
    error: float = 0.0

    def padded(self, step: int) -> "_Module":
        """Fill the rank up with zeros to a multiple of ``step``."""
        more, axes = -len(self.down) % step, self.down.ndim - 2
        if more == 0:
            return self
        rows, columns = (*(0, 0) * (axes + 1), 0, more), (*(0, 0) * axes, 0, more)
        mid = None if self.mid is None else F.pad(self.mid, (*(0, 0) * axes, 0, more, 0, more))
        return replace(self, down=F.pad(self.down, rows), up=F.pad(self.up, columns), mid=mid)

    def tensors(self) -> dict[str, Tensor]:
        """Return them by the names they have under the module's."""
        found = {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": torch.tensor(float(len(self.down)))}
        if self.mid is not None:
            found["lora_mid.weight"] = self.mid
        if self.dora_scale is not None:
            found["dora_scale"] = self.dora_scale
        for key, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{key} must be finite at unit scale, got NaN or infinity. Use a wider dtype.")
        return found


def _written(
    module: str, held: AdapterDict, live: Mapping[Site, Adapter], *, rank: int | None, energy: float | None
) -> _Module:
    """Write all updates of a module as one."""
    for site, one in live.items():
        reason = _obstacle(site)
        if reason is None and isinstance(one, DoRA) and type(site.owner).__name__ not in PLAIN:
            reason = f"LyCORIS leaves the magnitude of such a layer out ({type(site.owner).__name__})"
        if reason:
            raise ValueError(f"adapter must be one that these files can hold, got one at {module!r}: {reason}")
    first, one = next(iter(live.items()))
    if len(live) == 1 and first.part is None:
        if isinstance(one, TuckerConv) and (chain := one.conv_chain()) is not None:
            down, mid, up = chain
            return _Module(down=down, mid=mid, up=up * one.scaling)
        if isinstance(one, DoRA):
            assert one.lora_magnitude is not None
            own = own_factors(one)
            down, up = _one_product(first.operator, own.lora_A, own.lora_B * own.scaling)
            return _Module(down=down, up=up, dora_scale=one.lora_magnitude.view(-1, *(1,) * (down.ndim - 1)))
    whole, errors = first.whole, [0.0]
    rows, columns = [], []
    for site, one in live.items():
        own_form = exact(one)
        if not own_form and rank is None and energy is None:
            raise TypeError(
                f"adapter must be LoRA to be written in kohya's format, got {type(one).__name__} at {site.name!r}."
                " Give a rank or an energy to write what is nearest to it."
            )
        weight = site.operator.to_standard(base_weight(held, site)) if one.reads_base else None
        update = to_lora(one, weight) if own_form else to_lora(one, weight, rank=rank, energy=energy)
        errors.append(update.error)
        column = update.lora_B.new_zeros(whole.out_size, update.lora_B.shape[1])
        column[slice(None) if site.part is None else site.part.index] = update.lora_B * update.scaling
        rows.append(update.lora_A)
        columns.append(column)
    down, up = _one_product(whole, torch.cat(rows), torch.cat(columns, 1))
    return _Module(down=down, up=up, error=max(errors))


PLAIN = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Classes of layers that LyCORIS computes with a weight of its own making, DoRA's included."""


def _one_product(operator: Operator, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Write the product of each group as one product: down ``(R, n/g, *k)`` and up ``(m, R, 1, …)``."""
    groups, kernel = operator.groups, operator.shape[2:]
    down, up = operator.standard_A(lora_A).flatten(1), lora_B
    if groups > 1:
        up = torch.block_diag(*lora_B.view(groups, -1, lora_B.shape[1]))
    size, m = down.shape[1], len(up)
    if len(down) > min(size, m):
        product = (up.double() @ down.double()).to(down.dtype)
        down, up = (product, torch.eye(m).to(up)) if m < size else (torch.eye(size).to(down), product)
    return down.reshape(-1, *operator.shape[1:]), up.reshape(*up.shape, *(1,) * len(kernel))


def _sorted(tensors: Mapping[str, Tensor], ignored: tuple[str, ...], path: Path) -> dict[str, dict[str, Tensor]]:
    """Group tensors by module, and check what can be checked without one."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if ignored and key.startswith(ignored):
            continue
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"tensors must be lora_down, lora_up, lora_mid, alpha or dora_scale, got {key[:200]!r} in {path}."
                " LoHa, LoKr and others are not LoRA."
            )
        name, half, other = match.groups()
        plain = tensor.dtype in DTYPES or (other == "alpha" and not is_odd(tensor))
        if not plain or not torch.isfinite(tensor).all():
            raise ValueError(f"tensors must be finite floating point of ≥ 16 bits, got {key[:200]!r} in {path}")
        found.setdefault(name, {})[half or other] = tensor
    for name, own in found.items():
        if not own.keys() >= {"lora_down", "lora_up"}:
            raise ValueError(
                f"every module must have lora_down and lora_up, got {sorted(own)} for {name[:200]!r}; {path}"
            )
    if not found:
        raise ValueError(f"file must hold at least one module, got none in {path}")
    return found


def _read(site: Site | None, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Adapter:
    """Make the adapter that a module's tensors say."""
    if site is None or (reason := _obstacle(site)) is not None:
        raise ValueError(f"module must be one that LyCORIS can adapt, got {'no layer' if site is None else reason}")
    operator = site.operator
    down, up, mid = tensors["lora_down"], tensors["lora_up"], tensors.get("lora_mid")
    if mid is not None and not isinstance(operator, ConvOperator):
        raise ValueError("lora_mid must be of a convolution, got one of a linear layer")
    rank, ones = len(down) if down.ndim else 0, (1,) * len(operator.shape[2:])
    inner = operator.shape[1:] if mid is None else (operator.shape[1], *ones)
    expected = {"lora_down": (rank, *inner), "lora_up": (operator.shape[0], rank, *ones)}
    if mid is not None:
        expected["lora_mid"] = (rank, rank, *operator.shape[2:])
    if "dora_scale" in tensors:
        expected["dora_scale"] = (operator.shape[0], *(1,) * (len(operator.shape) - 1))
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape or rank == 0:
            raise ValueError(f"{key} must have shape {shape} with rank ≥ 1, got {tuple(tensors[key].shape)}")
    alpha = tensors.get("alpha", torch.tensor(float(rank)))
    if alpha.numel() != 1 or not math.isfinite(float(alpha)) or float(alpha) == 0:
        raise ValueError(
            f"alpha must be one finite number other than 0, got shape {tuple(alpha.shape)}, {alpha.tolist()!s:.40}"
        )
    scaling = float(alpha) / rank
    wide = dtype or _widest([down, up, *(tensors[key] for key in ("lora_mid", "dora_scale") if key in tensors)])
    if mid is not None and isinstance(operator, ConvOperator):
        ranks = TuckerRanks(kernel=max(operator.shape[2:]))
        if "dora_scale" not in tensors and ranks.of(operator, rank) == tuple(mid.shape):
            return _finite(_tucker(operator, down, mid, up, ranks, scaling, wide))
        down = torch.einsum("pq...,qi->pi...", mid.double(), down.flatten(1).double())
    lora_A, lora_B = _by_group(operator, down.double().flatten(1), up.double().flatten(1))
    kind = DoRA if "dora_scale" in tensors else LoRA
    one = kind(operator, rank=0, scaling=scaling, dropout=0.0, dtype=wide, generator=torch.Generator())
    one.replace_factors(lora_A.to(wide), lora_B.to(wide))
    if isinstance(one, DoRA):
        one.replace_magnitude(tensors["dora_scale"].flatten().to(wide))
    return _finite(one)


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (each.dtype for each in tensors))


def _finite(one: Adapter) -> Adapter:
    """Refuse values for which the adapter's dtype has no room."""
    if not all(torch.isfinite(each).all() for each in one.parameters()):
        raise ValueError("tensors must fit the adapter's dtype, got values beyond it. Use a wider dtype.")
    return one


def _tucker(
    operator: ConvOperator,
    down: Tensor,
    mid: Tensor,
    up: Tensor,
    ranks: TuckerRanks,
    scaling: float,
    dtype: torch.dtype,
) -> TuckerConv:
    """Make a Tucker adapter whose factors of the kernel's axes are identities."""
    generator = torch.Generator().manual_seed(0)
    one = TuckerConv(
        operator, rank=len(down), scaling=scaling, dropout=0.0, dtype=dtype, generator=generator, ranks=ranks
    )
    factors = {axis: torch.eye(operator.shape[axis]) for axis in one.axes if axis > 1}
    one.replace_factors(mid, {0: up.flatten(1), 1: down.flatten(1).T, **factors})
    return one


def _by_group(operator: Operator, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Write one product, ``(m, R)`` times ``(R, n/g·∏k)``, as one for each group: A ``(r, n·∏k)`` and B ``(m, r)``.

    A group needs only the directions that its rows of up use, and no more than it has outputs or inputs.

    Returns:
        A and B.
    """
    groups = operator.groups
    blocks = list(up.view(groups, -1, up.shape[1]))
    used = [block.any(0) for block in blocks]
    rank = max(1, *(int(each.sum()) for each in used))
    m, n = len(blocks[0]), down.shape[1]
    if rank <= min(m, n):
        pad = [rank - int(each.sum()) for each in used]
        rows = [F.pad(down[each], (0, 0, 0, more)) for each, more in zip(used, pad, strict=True)]
        columns = [F.pad(b[:, each], (0, more)) for b, each, more in zip(blocks, used, pad, strict=True)]
    elif m <= n:
        rows, columns = [block @ down for block in blocks], [torch.eye(m).to(up)] * groups
    else:
        rows, columns = [torch.eye(n).to(down)] * groups, [block @ down for block in blocks]
    return torch.cat(rows, 1), torch.cat(columns)


def _attach(model: nn.Module, made: Mapping[str, Adapter], adapter: str) -> dict[str, Adapter]:
    order = iter([made[name] for name in sites(model) if name in made])  # attach asks in the order of the sites
    ready = AdapterMethod(name="as saved", adapter=lambda *_, **__: next(order), scaling=None, adapts=lambda _: True)
    return attach(model, {name: one.rank for name, one in made.items()}, method=ready, adapter=adapter)
