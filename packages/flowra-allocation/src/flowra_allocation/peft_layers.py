"""LoRA layers of PEFT as pairs (:mod:`flowra_allocation.forms`), so that their rank can move while they train.

PEFT stays what it is: its layers keep their classes, its modules ``lora_A`` and ``lora_B`` get new weights, and after
every change ``model.peft_config`` says the present ranks, so ``save_pretrained`` writes an adapter that
``PeftModel.from_pretrained`` reads, at any time of the training. PEFT itself is not imported.

PEFT has no rank 0. A layer of rank 0 loses its adapter, as PEFT would have it on a module that is no target, and its
empty factors wait in ``lora_idle`` beside the others, where an optimiser finds them and no file does. Where the adapter
holds more than a pair (the magnitude of DoRA, a bias), one direction of zeros takes the pair's place.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from flowra_allocation.peft_patterns import alpha_of, endings, peft_patterns

__all__ = ["PeftLayer", "peft_layers"]

IDLE = "lora_idle"  # PEFT takes what lies there for its own, and so leaves it trainable


class LoraHost(Protocol):
    """What PEFT's LoRA layers have, by the name of the adapter."""

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, object]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict
    merged: bool

    def get_base_layer(self) -> nn.Module:
        """Return the layer that is adapted."""


class PeftLayer:
    """One adapter of one LoRA layer of PEFT, as a pair: y += s · B A x; or as the direction part of DoRA.

    The layer may be an ``nn.Linear``, a ``Conv1D`` of transformers, or a quantised layer: its own weight is not looked
    at. Made by :func:`peft_layers`.

    Args:
        host: PEFT's layer.
        adapter_name: of the adapter.
        configuration: of that adapter, told of every change of rank.

    Attributes:
        host: PEFT's layer.
        scaling: s, constant: PEFT's α / r, or α / √r, when this was made.
    """

    def __init__(self, host: nn.Module, adapter_name: str, configuration: "PeftConfiguration") -> None:
        self.host = host
        self._peft = cast(LoraHost, host)
        self._name, self._configuration = adapter_name, configuration
        self.scaling = float(self._peft.scaling[adapter_name])
        self._observer: Callable[[Tensor], None] | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def lora_A(self) -> nn.Parameter:
        """A, ``(r, n)``. Replaced whenever the rank changes."""
        return self._factor("A")

    @property
    def lora_B(self) -> nn.Parameter:
        """B, ``(m, r)``. Likewise."""
        return self._factor("B")

    @property
    def rank(self) -> int:
        """Number of directions; 0 is allowed here."""
        return len(self.lora_A)

    @property
    def cost_per_rank(self) -> int:
        """Parameters per unit of rank: m + n."""
        return self.lora_A.shape[1] + self.lora_B.shape[0]

    @property
    def max_rank(self) -> int:
        """The smaller of m and n: more directions would add nothing."""
        return min(self.lora_A.shape[1], self.lora_B.shape[0])

    @property
    def observer(self) -> Callable[[Tensor], None] | None:
        """Called with z = A x, ``(…, r)``, on every forward pass of the adapter; None at first."""
        return self._observer

    @observer.setter
    def observer(self, observer: Callable[[Tensor], None] | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._observer, self._hook = observer, None
        if observer is not None and self._name in self._peft.lora_A:
            self._hook = self._linear("A").register_forward_hook(self._show)

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of any common rank as new Parameters, and tell PEFT; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameters must be told: that is the caller's part.

        Args:
            lora_A: ``(r, n)``.
            lora_B: ``(m, r)``.

        Raises:
            ValueError: if the adapter is merged into the layer's weight.
        """
        if self._peft.merged:
            raise ValueError("adapter must not be merged while its rank changes, got one that is. Unmerge it first.")
        new_A = nn.Parameter(lora_A.detach().contiguous(), requires_grad=self.lora_A.requires_grad)
        new_B = nn.Parameter(lora_B.detach().contiguous(), requires_grad=self.lora_B.requires_grad)
        if len(lora_A) == 0:
            self._idle[f"A_{self._name}"], self._idle[f"B_{self._name}"] = new_A, new_B
            self._rest()
        else:
            if _is_idle(self.host, self._name):
                del self._idle[f"A_{self._name}"], self._idle[f"B_{self._name}"]
            self._seat(new_A, new_B)
        self._configuration.write()

    def recorded_once(self) -> AbstractContextManager[None]:
        """Put off telling PEFT, for all layers of the adapter, to the end of a ``with`` block, or of the outermost one.

        Returns:
            What to enter. ``model.peft_config`` is behind until it is left.
        """
        return self._configuration.written_once()

    def _seat(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put factors of rank ≥ 1 where PEFT looks for them, as Parameters or as buffers, and correct its books."""
        rank = len(lora_A)
        for modules, weight in ((self._peft.lora_A, lora_A), (self._peft.lora_B, lora_B)):
            if self._name not in modules:
                modules[self._name] = nn.Linear(1, 1, bias=False, device="meta")  # nothing is drawn
            linear = cast(nn.Linear, modules[self._name])
            if isinstance(weight, nn.Parameter):
                linear.weight = weight
                linear._parameters["bias"] = linear._parameters.pop("bias")  # the order it was made in
            else:
                del linear.weight
                linear.register_buffer("weight", weight)
            linear.out_features, linear.in_features = weight.shape
        self._peft.r[self._name] = rank
        self._peft.lora_alpha[self._name] = alpha_of(
            rank, self.scaling, use_rslora=self._peft.use_rslora.get(self._name, False)
        )

    def _rest(self) -> None:
        """Leave PEFT without the pair."""
        if self._has_magnitude or self._peft.lora_bias.get(self._name, False):
            a, b = self.lora_A.detach(), self.lora_B.detach()
            self._seat(a.new_zeros(1, a.shape[1]), b.new_zeros(len(b), 1))  # never trained
        else:
            for modules in (self._peft.lora_A, self._peft.lora_B):
                if self._name in modules:
                    del modules[self._name]

    @property
    def _idle(self) -> nn.ParameterDict:
        children = self.host._modules
        if IDLE not in children:
            self.host.add_module(IDLE, _Idle())
            for name in list(children)[list(children).index("lora_A") : -1]:
                children[name] = children.pop(name)  # behind it: factors keep their places among the Parameters
        return cast(nn.ParameterDict, self.host.get_submodule(IDLE))

    @property
    def _has_magnitude(self) -> bool:
        return self._name in self._peft.lora_magnitude_vector

    def _factor(self, side: str) -> nn.Parameter:
        if _is_idle(self.host, self._name):
            return cast(nn.Parameter, self._idle[f"{side}_{self._name}"])
        return cast(nn.Parameter, self._linear(side).weight)

    def _linear(self, side: str) -> nn.Linear:
        return cast(nn.Linear, (self._peft.lora_A if side == "A" else self._peft.lora_B)[self._name])

    def _show(self, module: nn.Module, args: tuple[Tensor], z: Tensor) -> None:
        """Show z, but not what DoRA computes its norm from: it passes the identity through A and B."""
        if self._observer is not None and not (self._has_magnitude and _is_identity(args[0])):
            self._observer(z)


class _Idle(nn.ParameterDict):
    """Empty factors: Parameters for an optimiser, nothing for a state dict."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *arguments: object) -> None:
        pass


def peft_layers(
    model: nn.Module, adapter_name: str = "default", *, names: Collection[str] | None = None
) -> dict[str, PeftLayer]:
    """Show the LoRA layers of a PEFT model as pairs whose rank can move.

    From now on ``model.peft_config[adapter_name]`` follows them (with a new object for every change, for other adapters
    may share the old one): ``r``, ``lora_alpha`` and their patterns say each layer's rank, and once a layer has reached
    rank 0 ``target_modules`` names those that are left. While all layers have rank 0 it stays what it was last.

    Args:
        model: a ``PeftModel``, or a model of another library that carries PEFT's layers and ``peft_config``.
        adapter_name: of the adapter.
        names: exact names of the layers wanted, as the base model has them; all if None. The others keep their rank.

    Returns:
        Name of the layer in the base model to layer, in the model's order. Hand ``model`` itself to the Refiner.

    Raises:
        ValueError: if the model has no such LoRA adapter, a name is unknown, or a layer wanted is no pair: embeddings,
            convolutions, raw parameters, ``nn.MultiheadAttention``, AdaLoRA, variants other than DoRA, tied factors.
    """
    base = cast(nn.Module, model.get_base_model()) if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    configurations = cast(dict[str, Any], getattr(model, "peft_config", {}))
    kind = str(getattr(configurations.get(adapter_name), "peft_type", None)).rpartition(".")[-1]
    hosts = {name: module for name, module in base.named_modules() if _has_adapter(module, adapter_name)}
    if kind != "LORA" or not hosts:
        raise ValueError(
            f"model must carry a LoRA adapter {adapter_name!r} of PEFT, got {kind} there and adapters"
            f" {sorted(configurations)}. PEFT's AdaLoRA moves rank by itself; start from a LoraConfig."
        )
    unknown = set(names or ()) - hosts.keys()
    if unknown:
        raise ValueError(f"names must be of layers with the adapter, got {sorted(unknown)} beside {sorted(hosts)[:5]}…")
    wanted = {name: host for name, host in hosts.items() if names is None or name in names}
    raw = [name for name, host in hosts.items() if hasattr(host, "parameter_name")]
    if raw:
        raise ValueError(f"target_parameters must be empty where rank is to move, got an adapter on {raw[0]!r}")
    tied = _tied(hosts, adapter_name)
    for name, host in wanted.items():
        obstacle = "factors that another layer has, too" if name in tied else _obstacle(host, adapter_name)
        if obstacle is not None:
            raise ValueError(f"layers must hold pairs of their own, got {obstacle}; at {name!r}. Name those that do.")
    others = [
        name for name, _ in base.named_modules() if name not in hosts and any(map(hosts.__contains__, endings(name)))
    ]
    configuration = PeftConfiguration(configurations, adapter_name, hosts, others)
    layers = {name: PeftLayer(host, adapter_name, configuration) for name, host in wanted.items()}
    configuration.write()
    return layers


class PeftConfiguration:
    """The configuration of one adapter, and the layers that it speaks of."""

    def __init__(
        self,
        configurations: dict[str, Any],
        adapter_name: str,
        hosts: Mapping[str, nn.Module],
        others: list[str],
    ) -> None:
        self._configurations, self._name = configurations, adapter_name
        self._hosts, self._others = hosts, others
        self._scalings = {name: float(cast(LoraHost, host).scaling[adapter_name]) for name, host in hosts.items()}
        self._exact = False  # whether target_modules must name each layer
        self._waits = self._behind = False

    @contextmanager
    def written_once(self) -> Iterator[None]:
        """Write at the end of the outermost such block, if there was anything to write in between."""
        waited, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = waited
            if self._behind:
                self.write()

    def write(self) -> None:
        """Put the present ranks into a copy of the configuration; at once, unless told to wait."""
        self._behind = self._waits
        if self._waits:
            return
        ranks = {name: _rank_in_peft(host, self._name) for name, host in self._hosts.items()}
        if not any(ranks.values()):
            return
        self._exact = self._exact or not all(ranks.values())
        configuration = copy.copy(self._configurations[self._name])
        patterns = peft_patterns(
            ranks,
            self._scalings,
            use_rslora=bool(configuration.use_rslora),
            others=self._others if self._exact else (),
        )
        for field, value in patterns.as_dict().items():
            if field != "target_modules":
                setattr(configuration, field, value)
            elif self._exact:
                configuration.target_modules = value
                configuration.layers_to_transform = configuration.layers_pattern = None
        self._configurations[self._name] = configuration


def _is_idle(host: nn.Module, adapter_name: str) -> bool:
    """Tell whether an adapter of a layer has rank 0."""
    return IDLE in host._modules and f"A_{adapter_name}" in cast(nn.ParameterDict, host._modules[IDLE])


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return hasattr(module, "lora_A") and adapter_name in getattr(module, "scaling", {})


def _rank_in_peft(host: nn.Module, adapter_name: str) -> int:
    """Return the rank that a saved adapter has there: 0 if there is nothing to save."""
    peft = cast(LoraHost, host)
    there = adapter_name in peft.lora_A or adapter_name in peft.lora_embedding_A
    return peft.r[adapter_name] if there else 0


def _obstacle(host: nn.Module, adapter_name: str) -> str | None:
    """Say what a layer is, if it is no pair that can be resized."""
    peft = cast(LoraHost, host)
    if adapter_name in peft.lora_embedding_A:
        return "an embedding, whose factors cannot be observed"
    if isinstance(peft.get_base_layer(), nn.MultiheadAttention):
        return "an nn.MultiheadAttention, of which PEFT merges each time"
    if peft.lora_variant.get(adapter_name) is not None and adapter_name not in peft.lora_magnitude_vector:
        return f"the variant {type(peft.lora_variant[adapter_name]).__name__}"
    if adapter_name in peft.lora_A and not isinstance(peft.lora_A[adapter_name], nn.Linear):
        return "a convolution, whose factors are kernels"
    return None


def _tied(hosts: Mapping[str, nn.Module], adapter_name: str) -> set[str]:
    """Name the layers that share a factor with another."""
    holders: dict[int, set[str]] = {}
    for name, host in hosts.items():
        for modules in (cast(LoraHost, host).lora_A, cast(LoraHost, host).lora_B):
            if adapter_name in modules:
                holders.setdefault(id(getattr(modules[adapter_name], "weight", None)), set()).add(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _is_identity(x: Tensor) -> bool:
    square = x.ndim == 2 and x.shape[0] == x.shape[1]
    return square and torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))
