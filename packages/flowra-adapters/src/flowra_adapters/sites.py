"""Where an adapter can go: one parameter of one module, or a part of it.

A site is named ``<module>[.<parameter>][:<part>]``. The parameter ``weight`` is meant where none is named:
``encoder.layer.0.query`` is its weight, ``encoder.layer.0.query.bias`` its bias, ``transformer.h.0.attn.c_attn:q`` the
rows of a fused projection that make queries, ``mlp.experts.down_proj:3`` the matrix of the fourth expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from flowra_adapters.adapter import AdapterDict
from flowra_adapters.operators import Operator, ParameterOperator, operator_of
from flowra_adapters.parts import Part, parts_of
from flowra_adapters.quantised import has_codes

__all__ = ["Site", "sites"]


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that an adapter may update."""

    name: str
    """Of the site, unique in the model."""
    owner: nn.Module
    """The module that holds the parameter, and the adapters of it."""
    parameter: str
    """Name of the parameter in its owner."""
    host: nn.Module
    """The module whose forward reads the parameter: the owner, or the attention block it is a part of."""
    operator: Operator
    """How the host uses this part of the parameter."""
    part: Part | None = None
    """Which rows of the weight in its standard layout; None for all of it."""

    @property
    def label(self) -> str:
        """What distinguishes this site from the main one of its owner; empty for that."""
        parameter = "" if self.parameter == "weight" else self.parameter
        return ":".join(each for each in (parameter, self.part.name if self.part else "") if each)

    def name_at(self, module: str) -> str:
        """Name the site by where its owner is now: an adapted module may have been put into another model."""
        name = module if self.parameter == "weight" else f"{module}.{self.parameter}".lstrip(".")
        return f"{name}:{self.part.name}" if self.part else name

    @property
    def whole(self) -> Operator:
        """The operator of the whole parameter."""
        return self.part.whole if self.part else self.operator


def sites(model: nn.Module) -> dict[str, Site]:
    """List every parameter that may carry an adapter, by name, in the model's own order, each followed by its parts.

    Not listed: parametrised, normalised and pruned weights (a merge would be lost), and what adapters that are already
    attached hold. A module or parameter that is reached by several names is listed under the first.

    Returns:
        Name to site.
    """
    found: dict[str, Site] = {}
    closed = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, AdapterDict))
    blocks = {name: each for name, each in model.named_modules() if isinstance(each, nn.MultiheadAttention)}
    for module_name, module in model.named_modules():
        if module_name.startswith(closed) or isinstance(module, AdapterDict) or parametrize.is_parametrized(module):
            continue
        block = blocks.get(module_name.rpartition(".")[0]) if "." in module_name else blocks.get("")
        for site in _of_module(module_name, module, block if block is not module else None):
            found[site.name] = site
            for part in parts_of(model, site.name, site.owner, site.operator):
                name = f"{site.name}:{part.name}"
                found[name] = Site(name, site.owner, site.parameter, site.host, part.operator, part)
    return found


def _of_module(name: str, module: nn.Module, block: nn.MultiheadAttention | None) -> Iterator[Site]:
    operator = None if block is not None else operator_of(module)
    renormed = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    if isinstance(module, nn.RNNBase) or renormed:
        return  # the first keeps its weights in a list of its own, the second rewrites them while it reads
    rewritten = _rewritten(module)
    for parameter, tensor in module._parameters.items():
        if tensor is None or isinstance(tensor, nn.UninitializedParameter) or tensor.ndim == 0:
            continue
        if parameter.startswith(rewritten):
            continue
        main = parameter == "weight"
        at = name if main else f"{name}.{parameter}".lstrip(".")
        if not at:
            continue  # the model itself
        if not (main and operator is not None) and has_codes(tensor):
            continue  # of a quantised layer whose use of them is not known
        uses = operator if main and operator is not None else ParameterOperator(_shape(tensor))
        yield Site(at, module, parameter, module if block is None else block, uses)


def _rewritten(module: nn.Module) -> tuple[str, ...]:
    """Return what names of parameters begin with that hooks turn into a weight before our own could act on them.

    These are ``weight_g`` and ``weight_v`` of ``torch.nn.utils.weight_norm``, ``weight_orig`` of ``spectral_norm`` and
    of pruning.
    """
    hooks = module._forward_pre_hooks.values()
    names = [each.name for each in hooks if isinstance(each, WeightNorm | SpectralNorm)]
    return tuple(f"{name}_" for name in (*names, *(h._tensor_name for h in hooks if isinstance(h, BasePruningMethod))))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
