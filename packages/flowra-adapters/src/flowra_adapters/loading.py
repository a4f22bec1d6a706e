"""Attach the adapter in a folder to a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter
from flowra_adapters.attach import attach
from flowra_adapters.checkpoint import AdapterCheckpoint, check_saved
from flowra_adapters.dora import DoRA
from flowra_adapters.flowra_files import FLOWRA_CONFIG_NAME, load_flowra_files
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import low_rank
from flowra_adapters.methods import METHODS, AdapterMethod
from flowra_adapters.offset import ParameterOffset
from flowra_adapters.operators import EmbeddingOperator, ParameterOperator
from flowra_adapters.peft_layout import from_peft
from flowra_adapters.peft_reader import read_checkpoint
from flowra_adapters.sites import Site, sites

__all__ = ["attach_checkpoint", "load_adapter"]


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    methods: Iterable[AdapterMethod] = (),
) -> dict[str, Adapter]:
    """Attach the adapter in a folder to a model, and load its ``modules_to_save`` into the model's own modules.

    Args:
        model: changed in place; left as it was if anything does not fit.
        folder: Flowra's two files or PEFT's; where both are there, Flowra's, which say all of it.
        adapter: name for the attached set.
        dtype: of the adapter's tensors; by default the files'. Only for PEFT's.
        methods: methods of your own that Flowra's files may name.

    Returns:
        The attached adapters by site name.

    Raises:
        ValueError: if the files are damaged, or any tensor does not fit or has no place in this model.
    """
    folder = Path(folder)
    if (folder / FLOWRA_CONFIG_NAME).exists():
        if dtype is not None:
            raise ValueError(f"dtype must be None for Flowra's own files, which are read as written, got {dtype}")
        return load_flowra_files(model, folder, adapter=adapter, methods=methods)
    checkpoint = read_checkpoint(folder)
    try:
        return attach_checkpoint(model, checkpoint, adapter=adapter, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


def attach_checkpoint(
    model: nn.Module, checkpoint: AdapterCheckpoint, *, adapter: str = "default", dtype: torch.dtype | None = None
) -> dict[str, Adapter]:
    """Attach values, and load what was trained in full into the model's own modules.

    A trained bias becomes an offset of the model's own.

    Args:
        model: changed in place; left as it was if anything does not fit.
        checkpoint: the values.
        adapter: name for the attached set.
        dtype: of the adapter's tensors; by default the checkpoint's.

    Returns:
        The attached adapters by site name.

    Raises:
        ValueError: if any tensor does not fit or has no place in this model.
    """
    own, places = model.state_dict(), sites(model)
    for name, tensor in checkpoint.modules_to_save.items():
        check_saved(name, tensor, own)
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, (a, b) in checkpoint.factors.items():
        for place, ours_a, ours_b in _places(model, places, checkpoint, name, a, b):
            wide = dtype or torch.promote_types(ours_a.dtype, ours_b.dtype)
            factors[place] = ours_a.to(wide), ours_b.to(wide), checkpoint.scalings[name]
            if not all(torch.isfinite(each).all() for each in factors[place][:2]):
                raise ValueError(f"factors must fit {wide}, got values beyond it for {name!r}")
    offsets = _bias_offsets(places, checkpoint)
    ranks = {place: a.shape[0] for place, (a, _, _) in factors.items()}
    low_rank_method = "dora" if checkpoint.magnitudes else "lora"
    ready = AdapterMethod(
        name="as saved",
        adapter=LoRA,
        scaling=METHODS["lora"].scaling,
        adapts=lambda site: site.name in ranks or site.name in offsets,
        instead=lambda site: "bitfit" if site.name in offsets else low_rank_method,
    )
    found = attach(
        model,
        ranks | dict.fromkeys(offsets, 1),
        method=ready,
        modules_to_save=checkpoint.trained_modules,
        adapter=adapter,
    )
    for place, one in found.items():
        if isinstance(one, ParameterOffset):
            one.replace_offset(offsets[place].to(one.offset).unsqueeze(0))
            continue
        assert isinstance(one, LoRA)
        a, b, one.scaling = factors[place]
        device = one.lora_A.device
        one.replace_factors(a.to(device), b.to(device))
        if isinstance(one, DoRA):
            magnitude = checkpoint.magnitudes[place]
            one.replace_magnitude(magnitude.to(device=device, dtype=dtype or magnitude.dtype))
    with torch.no_grad():
        for name, tensor in checkpoint.modules_to_save.items():
            own[name].copy_(tensor)
    return found


def _places(
    model: nn.Module, places: Mapping[str, Site], checkpoint: AdapterCheckpoint, name: str, a: Tensor, b: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """List the sites of a pair of factors, with their own in our layout."""
    kind = checkpoint.kinds.get(name)
    if kind == "attention":
        names = [f"{name}.in_proj_weight"]
    elif kind == "parameter":
        names = [name.removesuffix(".weight") if name.endswith(".weight") else name]
        whole = places.get(names[0])
        if whole is not None and len(whole.operator.shape) == 3:
            names = [f"{names[0]}:{index}" for index in range(whole.operator.shape[0])]
            if getattr(whole.owner, "is_transposed", False):
                a, b = b.mT, a.mT
        if len(names) != len(a):
            raise ValueError(f"adapter must belong to this base, got {len(a)} matrices for {name!r} ({len(names)})")
    else:
        names = [name]
    found = []
    for index, each in enumerate(names):
        site = places.get(each)
        fits = site is not None and low_rank(site) and (kind == "embedding") == _is_embedding(site)
        if site is None or not fits or (kind is None and not _is_layer(model, site)):
            raise ValueError(f"adapter must fit the model, got one for {each!r}, no layer of it")
        factors = (a[index], b[index]) if kind == "parameter" else (a, b)
        try:
            ours = from_peft(site.operator, *factors)
        except ValueError as error:
            size = (factors[1].shape[0], *factors[0].shape[1:])
            raise ValueError(
                f"adapter must belong to this base, got an update of {size} for {each!r} ({site.operator.shape}):"
                f" {error}"
            ) from None
        found.append((each, *ours))
    return found


def _is_embedding(site: Site) -> bool:
    return isinstance(site.operator, EmbeddingOperator)


def _is_layer(model: nn.Module, site: Site) -> bool:
    """Tell whether a site is a layer whose use is known, or the output projection of an attention block."""
    return not isinstance(site.operator, ParameterOperator) or isinstance(site.host, nn.MultiheadAttention)


def _bias_offsets(places: Mapping[str, Site], checkpoint: AdapterCheckpoint) -> dict[str, Tensor]:
    """Return what is added to biases of the model: trained values less the model's own, and PEFT's ``lora_bias``."""
    found: dict[str, Tensor] = {}
    for name, value in checkpoint.biases.items():
        site = places.get(name)
        if site is None or site.operator.shape != value.shape or not METHODS["bitfit"].adapts(site):
            raise ValueError(f"biases must fit the model, got {tuple(value.shape)} for {name!r}")
        base = site.owner._parameters[site.parameter]
        assert base is not None
        wide = torch.promote_types(torch.promote_types(base.dtype, value.dtype), torch.float32)
        found[name] = value.to(base.device, wide) - base.detach().to(wide)
    for module, offset in checkpoint.bias_offsets.items():
        name = f"{module}.bias"
        site = places.get(name)
        if site is None or site.operator.shape != offset.shape:
            raise ValueError(
                f"lora_bias must add to a bias of the model, got one for {module!r}, which has none. Call"
                " create_missing_biases first."
            )
        found[name] = found[name] + offset if name in found else offset
    for name, offset in found.items():
        if not torch.isfinite(offset.to(places[name].owner._parameters[places[name].parameter])).all():
            raise ValueError(f"biases must fit the model's dtype, got values beyond it for {name!r}")
    return found
