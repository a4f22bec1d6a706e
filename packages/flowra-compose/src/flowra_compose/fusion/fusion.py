"""Many frozen adapters on one model, weighed anew at every position: y = W₀ x + Σᵢ wᵢ sᵢ Bᵢ Aᵢ x.

The factors of all adapters at a module lie one beside the other along the rank, so one pass of width Σ rᵢ serves all
of them, and its rank slices are weighed before B. No output of a single adapter is formed. The weights of a position
depend on that position's hidden states alone, with which its cached keys and values were made, so that decoding with a
cache is exact.

Source: Wang et al. 2024, *LoRA-Flow* (arXiv:2402.11455), equations 4 and 5. ``docs/methods.md``, section 29.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flowra_compose.fusion.fusion_record import FusionRecord
from flowra_compose.fusion.gates import GateOptions, Gates
from flowra_compose.fusion.places import block_of, blocks_of, check_modules, first_of, gate_places
from flowra_compose.fusion.routing import Routing, UntrainedRouting
from flowra_compose.lazy_updates import outlines_of
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.merge import heads_source

__all__ = ["Fusion", "OtherPositionsError", "fuse", "gates_for"]

CHILD = "flowra_fusion"
"""Name under which the model holds what is fused, while it is."""
SAMPLE = 16
"""Numbers of an input by which it is known again."""


class OtherPositionsError(RuntimeError):
    """A module saw other positions than its block, so that the block's weights say nothing of them."""


class _Slot:
    """The weights in force for the modules of a block, repeated along the ranks of each.

    All are made when the gate answers: a block that is run again from a checkpoint of its activations, with or without
    its hooks, then does what it did before.
    """

    def __init__(self) -> None:
        self.modules: list[_FusedUpdates] = []
        self.weights: Tensor | None = None
        self.expanded: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
        self.gradients = False
        self.first: dict[str, Tensor] | None = {}
        self.refused = False

    def set(self, weights: Tensor) -> None:
        self.first = {} if self.weights is None or self.refused else None
        self.weights = weights
        self.gradients = torch.is_grad_enabled()
        self.expanded.clear()
        for each in self.modules:
            if each.kind not in self.expanded:
                self.expanded[each.kind] = each.expanded(weights)

    def check_seen(self, name: str, x: Tensor) -> None:
        """Refuse a module that one pass through the block calls with two inputs, of which one is not its positions.

        The first pass is looked at; recomputing it from a checkpoint gives the same input again.

        Raises:
            OtherPositionsError: if it is.
        """
        if self.first is None:
            return
        sample = x.detach().reshape(-1)[:SAMPLE].clone()
        if not torch.equal(self.first.setdefault(name, sample), sample):
            self.refused = True
            raise OtherPositionsError(
                f"modules must see the positions of their block once in a pass, got two inputs at {name!r}, as where"
                " relative positions go through the same layer. Use gates of level 'module' for this model."
            )


class _FusedUpdates(nn.Module):
    """The updates of one module by all adapters, along the rank."""

    def __init__(self, updates: Sequence[LowRankUpdate | None]) -> None:
        super().__init__()
        present = [(index, update) for index, update in enumerate(updates) if update is not None]
        dtype = present[0][1].dtype
        for _, update in present:
            dtype = torch.promote_types(dtype, update.dtype)
        self.ranks = tuple(0 if update is None else update.rank for update in updates)
        owners = [index for index, update in present for _ in range(update.rank)]
        self.lora_A: Tensor
        self.lora_B: Tensor
        self.owners: Tensor
        a = torch.cat([update.lora_A.detach().to(dtype) for _, update in present])
        b = torch.cat([(update.scaling * update.lora_B.detach().double()).to(dtype) for _, update in present], dim=1)
        self.register_buffer("lora_A", a, persistent=False)
        self.register_buffer("lora_B", b.contiguous(), persistent=False)
        self.register_buffer("owners", torch.tensor(owners), persistent=False)

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        """What modules have in common whose expanded weights are the same."""
        return self.ranks, self.lora_A.dtype

    def coordinates(self, x: Tensor) -> Tensor:
        """Return A x, ``(…, Σ rᵢ)``."""
        return nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)

    def expanded(self, weights: Tensor) -> Tensor:
        """Repeat the weights ``(…, k)`` along the ranks, ``(…, Σ rᵢ)``, in the dtype of the factors."""
        return weights.to(self.lora_A.dtype)[..., self.owners]

    def added(self, output: Tensor, coordinates: Tensor, expanded: Tensor) -> Tensor:
        """Return output + B (weights ⊙ coordinates), in the output's dtype."""
        weighted = coordinates * expanded
        if output.dtype != weighted.dtype:
            return output + nn.functional.linear(weighted, self.lora_B).to(output.dtype)
        rows = output.reshape(-1, output.shape[-1])
        flat = torch.addmm(rows, weighted.reshape(-1, weighted.shape[-1]), self.lora_B.T)
        return flat.view(output.shape)


class Fusion(nn.Module):
    """k adapters on a model, weighed by a routing. Made by :func:`fuse`; a context manager that takes them off again.

    While it is on, the model holds it as a child, so that it moves with the model and a trainer finds its gates; the
    base's parameters do not ask for gradients.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, AdapterState], routing: Routing, heads: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.names = tuple(adapters)
        self.routing = routing
        hosts, updates = _updates_by_module(model, list(adapters.values()))
        _check_routing(model, routing, updates)
        self.updates = nn.ModuleList(_FusedUpdates(each) for each in updates.values())
        self._ranks = {name: tuple(0 if one is None else one.rank for one in each) for name, each in updates.items()}
        self._enabled = True
        self._records: list[FusionRecord] = []
        self._undo: list[Callable[[], object]] = []
        try:
            self._put_on(model, hosts, heads)
        except BaseException:
            self.remove()
            raise

    @property
    def adapters(self) -> int:
        """K."""
        return len(self.names)

    def forward(self, output: Tensor) -> Tensor:
        """Return what it is given: an ``nn.Sequential`` calls its children, and this is the last."""
        return output

    def remove(self) -> None:
        """Take the adapters off: the model is bit for bit what it was, flags and heads included. Twice is no error."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Fusion":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: object) -> "Fusion":
        """Refuse: hooks on a copy would still be the original's, gates and gradients included."""
        raise TypeError("a fused model must not be copied, for its hooks stay the original's. Call remove() first.")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, let the base answer alone."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @contextmanager
    def recording(self) -> Iterator[FusionRecord]:
        """Within the block, keep the weights of every call, with their graph unless gradients are off."""
        record = FusionRecord()
        self._records.append(record)
        try:
            yield record
        finally:
            self._records.remove(record)

    def _put_on(self, model: nn.Module, hosts: Mapping[str, nn.Module], heads: Mapping[str, Tensor]) -> None:
        self._undo.append(_replaced(model, heads))
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._undo.append(lambda: [parameter.requires_grad_(True) for parameter in frozen])
        self.to(_device(hosts))
        model.add_module(CHILD, self)
        self._undo.append(lambda: delattr(model, CHILD))
        slots: dict[str, _Slot] = {}
        if self.routing.level != "module":
            blocks = blocks_of(model, hosts)
            shared = _Slot()
            for name in blocks:
                slots[name] = shared if self.routing.level == "step" else _Slot()
                if self.routing.level == "layer":
                    self._watch_block(model.get_submodule(name), name, slots[name])
            if self.routing.level == "step":  # the first block of all, be it adapted or not
                self._watch_block(model.get_submodule(first_of(model, blocks[0])), "", shared)
        for (name, host), one in zip(hosts.items(), self.updates, strict=True):
            assert isinstance(one, _FusedUpdates)
            block = next((each for each in slots if name.startswith(f"{each}.")), None)
            if block is not None:
                inside = name.removeprefix(f"{block}.")
                flat = block_of(model.get_submodule(block), inside) is None  # experts see positions in their own order
                self._watch_module(host, name, one, slots[block], flat=flat)
            else:
                self._watch_module(host, name, one, None)

    def _watch_block(self, block: nn.Module, place: str, slot: _Slot) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            if self._enabled:
                hidden = inputs[0] if inputs else options["hidden_states"]
                slot.set(self._weights(place, hidden))

        self._undo.append(block.register_forward_pre_hook(before, with_kwargs=True).remove)

    def _watch_module(
        self, host: nn.Module, name: str, updates: _FusedUpdates, slot: _Slot | None, *, flat: bool = False
    ) -> None:
        if slot is not None:
            slot.modules.append(updates)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._enabled:
                return None
            x = inputs[0]
            coordinates = updates.coordinates(x)
            if slot is None:
                expanded = updates.expanded(self._weights(name, x, coordinates))
            else:
                seen = None if slot.weights is None else slot.weights.shape[:-1]
                flattened = flat and seen is not None and x.shape[:-1] == (seen.numel(),)  # (batch · positions, n)
                if not flattened and (seen is None or not _same_positions(seen, x.shape[:-1])):
                    raise OtherPositionsError(
                        f"modules must see the positions that their block saw, got {tuple(x.shape)} at {name!r}."
                        " Use gates of level 'module' for this model."
                    )
                if slot.gradients != torch.is_grad_enabled():
                    raise RuntimeError(
                        f"modules must keep gradients where their gate does, got other modes at {name!r}."
                        " Checkpoint activations with use_reentrant=False."
                    )
                slot.check_seen(name, x)
                expanded = slot.expanded[updates.kind]
                if expanded.shape[:-1] != x.shape[:-1]:
                    expanded = expanded.reshape(*x.shape[:-1], expanded.shape[-1])
            return updates.added(output, coordinates, expanded)

        self._undo.append(host.register_forward_hook(after).remove)

    def _weights(self, place: str, hidden: Tensor, coordinates: Tensor | None = None) -> Tensor:
        weights, shares = self.routing.weights(place, hidden, coordinates)
        for record in self._records:
            record.weights.setdefault(place, []).append(self._multiplying(place, weights))
            record.shares.setdefault(place, []).append(shares)
        return weights

    def _multiplying(self, place: str, weights: Tensor) -> Tensor:
        """Return weights with 0 where a module's own gate weighs an adapter that does not update the module."""
        if self.routing.level != "module":
            return weights
        present = torch.tensor([rank > 0 for rank in self._ranks[place]], device=weights.device)
        return weights * present


def fuse(
    model: nn.Module, adapters: Mapping[str, AdapterState], routing: Routing, *, heads_from: str | None = None
) -> Fusion:
    """Put adapters on a model, weighed at every position by a routing.

    Args:
        model: any model of linear layers; for gates of level ``layer`` or ``step`` one with a single stack of repeated
            blocks whose first input is the hidden states ``(batch, positions, d)``, such as the decoders and encoders
            of ``transformers``. It must carry no other fusion.
        adapters: name to adapter, in the order of the routing's weights. Ranks and modules may differ; only updates of
            linear layers are taken.
        routing: :class:`Gates` (see :func:`gates_for`), :class:`StaticWeights`, :class:`Arrow` or :class:`SpectR`.
        heads_from: name of the adapter whose ``modules_to_save`` replace the model's while they are fused; needed if
            adapters carry different ones.

    Returns:
        What takes them off again, also as a context manager.

    Raises:
        ValueError: if the adapters do not fit the routing, each other or the model.
    """
    states = list(adapters.values())
    if any(hasattr(each, CHILD) for each in model.modules()):
        raise ValueError("model must carry no fusion yet, got one. Call its remove() first.")
    if not adapters or routing.adapters != len(adapters):
        raise ValueError(
            f"routing must be for the {len(adapters)} adapters given, at least one, got {routing.adapters}"
        )
    names = {one.base_model_name_or_path for one in states} - {None}
    if len(names) > 1:
        raise ValueError(f"adapters must be of one base, got {sorted(map(str, names))}")
    if heads_from is not None and heads_from not in adapters:
        raise ValueError(f"heads_from must be the name of an adapter, one of {list(adapters)}, got {heads_from!r}")
    index = None if heads_from is None else list(adapters).index(heads_from)
    source = heads_source(states, list(adapters), index)
    return Fusion(model, adapters, routing, {} if source is None else states[source].modules_to_save)


def gates_for(
    model: nn.Module, adapters: Mapping[str, AdapterState], options: GateOptions | None = None, *, seed: int = 0
) -> Gates:
    """Make the gates that a model needs for adapters, untrained.

    Args:
        model: the base.
        adapters: name to adapter.
        options: of the gates.
        seed: of gates of low rank.

    Returns:
        Gates, float32 on the CPU.

    Raises:
        ValueError: if the adapters do not fit the model, or the options do not fit them.
    """
    options = options or GateOptions()
    _, updates = _updates_by_module(model, list(adapters.values()), outlines=True)
    shapes = {name: _shape(each) for name, each in updates.items()}
    return Gates(gate_places(model, shapes, options.level), len(adapters), options, seed=seed)


def _updates_by_module(
    model: nn.Module, adapters: Sequence[AdapterState], *, outlines: bool = False
) -> tuple[dict[str, nn.Module], dict[str, list[LowRankUpdate | None]]]:
    """Return the modules that adapters update, sorted by name, and the update of each by every adapter."""
    known = [outlines_of(one.updates) if outlines else dict(one.updates.items()) for one in adapters]
    updates: dict[str, list[LowRankUpdate | None]] = {}
    for name in sorted({name for one in known for name in one}):
        found = [one.get(name) for one in known]
        present = [each for each in found if each is not None]
        odd = [each.layout for each in present if each.layout != "linear"]
        if odd:
            raise ValueError(
                f"only updates of linear layers can be fused, got layout {odd[0]!r} at {name!r}. Merge these adapters."
            )
        if len({each.shape for each in present}) > 1:
            raise ValueError(f"adapters must agree on a module's shape, got {[e.shape for e in present]} at {name!r}")
        updates[name] = found
    if not updates:
        raise ValueError("adapters must update at least one module, got none")
    hosts = check_modules(model, {name: _shape(each) for name, each in updates.items()})
    return hosts, updates


def _check_routing(model: nn.Module, routing: Routing, updates: Mapping[str, Sequence[LowRankUpdate | None]]) -> None:
    """Refuse a routing that was made for another model or for other adapters."""
    if isinstance(routing, Gates):
        places = gate_places(model, {name: _shape(each) for name, each in updates.items()}, routing.level)
        if places != routing.widths:
            raise ValueError(
                f"gates must stand where the model needs them, at {_brief(places)}, got {_brief(routing.widths)}."
                " Make them with gates_for on this model and these adapters."
            )
    if isinstance(routing, UntrainedRouting):
        ranks = {name: tuple(0 if one is None else one.rank for one in each) for name, each in updates.items()}
        if ranks != routing.ranks:
            raise ValueError(
                f"routing must be made of the adapters that are fused, in their order, got {type(routing).__name__} of"
                " others"
            )


def _same_positions(seen: Sequence[int], here: Sequence[int]) -> bool:
    """Tell whether shapes differ by axes of length 1 at most: some models put one between batch and positions."""
    kept = [[size for size in shape if size != 1] for shape in (seen, here)]
    return seen[:1] == here[:1] and kept[0] == kept[1]


def _device(hosts: Mapping[str, nn.Module]) -> torch.device:
    """Return where the modules are.

    Raises:
        ValueError: if that is not one place.
    """
    devices = {each.device for host in hosts.values() for each in (*host.parameters(), *host.buffers())}
    if len(devices) > 1 or any(each.type == "meta" for each in devices):
        raise ValueError(
            f"model must be on one device to be fused, got {sorted(map(str, devices))}. Load it without device_map and"
            " without offloading."
        )
    return devices.pop()


def _brief(places: Mapping[str, int]) -> str:
    first = next(iter(places.items()), None)
    return f"{len(places)} places, first {first}"


def _shape(updates: Sequence[LowRankUpdate | None]) -> tuple[int, int]:
    return next(each.shape for each in updates if each is not None)


def _replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put tensors in the place of the model's of that name, and return what puts the model's back."""
    own = dict(model.state_dict(keep_vars=True))
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            got = "none" if name not in own else f"{tuple(own[name].shape)}"
            raise ValueError(f"heads must fit the model, got {tuple(tensor.shape)} for {name!r} where it has {got}")
        tied = [other for other, value in own.items() if value is own[name] and other not in tensors]
        if tied:
            raise ValueError(f"heads must be tied to no other weight, got {name!r}, which is {tied[0]!r}. Untie them.")
    before = {name: own[name].detach().clone() for name in tensors}

    def put(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)

    put(tensors)
    return lambda: put(before)
