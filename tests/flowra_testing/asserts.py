"""The laws of adapters, each as a function over a method, a layer type and a dtype."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flowra_adapters import Adapter, attach, detach, disable, disabled, enable, merge, merged, sites, unmerge
from flowra_testing.adapter_table import LayerType, Method
from flowra_testing.tiny_models import seeded

# Relative to max |y|, per module.
MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
GROWTH_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
PRODUCT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # adapters of bf16 are fp32
SCALING = 1.5


class Host(nn.Module):
    """A layer under test, a gain, a head that is trained in full, and a buffer."""

    shift: Tensor

    def __init__(self, layer: nn.Module, output: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.full((output.shape[-1],), 0.8))
        self.head = nn.Linear(output.shape[-1], 2)
        self.register_buffer("shift", torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input to ``(…, 2)``."""
        output: Tensor = self.head(torch.tanh(self.layer(x) * self.gain)) + self.shift
        return output


@dataclass(frozen=True)
class Case:
    """A host, an input, and what the layer answered before anything was attached."""

    model: Host
    x: Tensor
    base_output: Tensor
    site: str
    """Name of what is adapted."""

    @property
    def layer(self) -> nn.Module:
        """The layer under test."""
        return self.model.layer

    @property
    def weight(self) -> Tensor:
        """Its weight."""
        site = sites(self.model)[self.site]
        weight = site.owner._parameters[site.parameter]
        assert weight is not None
        return weight

    def output(self) -> Tensor:
        """What the layer answers now."""
        with torch.no_grad():
            answer: Tensor = self.layer(self.x)
        return answer


def build_case(layer_type: LayerType, dtype: torch.dtype) -> Case:
    """Build a host around a fresh layer of this type."""
    layer, x = layer_type.layer(dtype), layer_type.inputs(dtype)
    with torch.no_grad():  # frozen, as attaching leaves it: torch picks its kernel by requires_grad, too
        output = deepcopy(layer).requires_grad_(False)(x)
    with seeded(3):
        model = Host(layer, output).to(dtype).eval()
    return Case(model, x, output, layer_type.name)


def attach_to(case: Case, method: Method, rank: int, *, adapter: str = "default") -> Adapter:
    """Attach one adapter of the method to the layer of the case."""
    return attach(case.model, {case.site: rank}, method=method.made_by, adapter=adapter, **strength(method))[case.site]


def strength(method: Method) -> dict[str, float]:
    """Return what attaching a method is told about its scaling."""
    return {"alpha" if method.takes_alpha else "scaling": SCALING} if method.scaled else {}


def randomise(adapter: nn.Module, *, seed: int = 4) -> None:
    """Fill every adapter tensor with values that make the update as large as the layer's own output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def trained_case(method: Method, layer_type: LayerType, dtype: torch.dtype) -> tuple[Case, Adapter]:
    """Build a case with an adapter that has left its birth state."""
    case = build_case(layer_type, dtype)
    adapter = attach_to(case, method, layer_type.rank)
    randomise(adapter)
    return case, adapter


def delta_of(case: Case, adapter: Adapter) -> Tensor:
    """Materialise an adapter's update of the case's weight as it is now."""
    place = sites(case.model)[case.site]
    weight = (
        case.weight.detach() if place.part is None else place.part.of(place.whole.to_standard(case.weight.detach()))
    )
    return adapter.delta_weight(weight if place.part is not None else place.operator.to_standard(weight)).detach()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max().item()
    bound = tolerance * expected.double().abs().max().item()
    assert difference <= bound, f"largest difference {difference:.3g} exceeds {bound:.3g}"


def assert_identity_at_birth(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Attaching leaves the output unchanged, at every rank."""
    for rank in (0, 1, layer_type.rank):
        case = build_case(layer_type, dtype)
        attach_to(case, method, rank)
        if method.exact_at_birth:
            assert torch.equal(case.output(), case.base_output)
        else:
            assert_close(case.output(), case.base_output, MERGE_TOLERANCE[dtype])


def assert_delta_weight_is_the_update(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """The materialised update has the weight's layout, at least float32, and explains the change of the output."""
    case, adapter = trained_case(method, layer_type, dtype)
    delta = adapter.operator.to_stored(delta_of(case, adapter))
    assert torch.promote_types(delta.dtype, torch.float32) == delta.dtype
    assert_close(case.output(), _answer_with(case, delta), MERGE_TOLERANCE[dtype])
    assert not torch.equal(case.output(), case.base_output)


def _answer_with(case: Case, delta: Tensor) -> Tensor:
    """Return what the layer alone answers in float64 with this update, in its own layout, added to its weight."""
    probe = deepcopy(case)
    detach(probe.model)
    probe.model.double()
    part = sites(probe.model)[case.site].part
    with torch.no_grad():
        target = probe.weight if part is None else part.of(probe.weight)
        assert delta.shape == target.shape
        target.add_(delta.double())
        answer: Tensor = probe.layer(probe.x.double() if probe.x.is_floating_point() else probe.x)
    return answer


def assert_merge_equals_unmerged(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Merged weights give the unmerged output."""
    case, _ = trained_case(method, layer_type, dtype)
    unmerged = case.output()
    merge(case.model)
    assert merged(case.model)
    assert_close(case.output(), unmerged, MERGE_TOLERANCE[dtype])


def assert_second_merge_is_a_no_op(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Merging twice gives the bits of merging once, and still unmerges."""
    case, _ = trained_case(method, layer_type, dtype)
    base = case.weight.detach().clone()
    merge(case.model)
    once = case.weight.detach().clone()
    merge(case.model)
    assert torch.equal(case.weight, once)
    unmerge(case.model)
    assert torch.equal(case.weight, base)


def assert_unmerge_restores_bitwise(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """From the kept copy the base weight and the adapted output come back bit by bit."""
    case, _ = trained_case(method, layer_type, dtype)
    base, unmerged = case.weight.detach().clone(), case.output()
    merge(case.model)
    unmerge(case.model)
    assert not merged(case.model)
    assert torch.equal(case.weight, base)
    assert torch.equal(case.output(), unmerged)


def assert_unmerge_without_copy_restores_to_rounding(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Without a copy the base weight comes back within 2·eps·|W|, for the larger of base and merged |W|."""
    case, _ = trained_case(method, layer_type, dtype)
    base = case.weight.detach().clone()
    merge(case.model, keep_weight=False)
    largest = torch.maximum(base.abs(), case.weight.detach().abs()).double()
    unmerge(case.model)
    assert ((case.weight.double() - base.double()).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


def assert_second_unmerge_is_a_no_op(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Unmerging what is not merged changes nothing, with and without a copy."""
    for keep_weight in (True, False):
        case, _ = trained_case(method, layer_type, dtype)
        merge(case.model, keep_weight=keep_weight)
        unmerge(case.model)
        once = case.weight.detach().clone()
        unmerge(case.model)
        assert torch.equal(case.weight, once)


def assert_disabling_restores_the_base(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """A disabled adapter leaves the base output bit by bit; enabling brings the adapted one back."""
    case, _ = trained_case(method, layer_type, dtype)
    adapted = case.output()
    with disabled(case.model):
        assert torch.equal(case.output(), case.base_output)
    assert torch.equal(case.output(), adapted)
    disable(case.model)
    assert torch.equal(case.output(), case.base_output)
    enable(case.model)
    assert torch.equal(case.output(), adapted)


def _train(case: Case, *, steps: int, watch: Callable[[], None] = lambda: None) -> None:
    trainable = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05, weight_decay=0.1)
    case.model.train()
    for step in range(steps):
        optimizer.zero_grad()
        x = case.x + 0.1 * step if case.x.is_floating_point() else case.x
        (case.model(x).double() - 1).square().mean().backward()
        watch()
        optimizer.step()


def assert_only_adapters_learn(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """After AdamW steps no base parameter or buffer has changed; adapters and modules trained in full have."""
    case = build_case(layer_type, dtype)
    attach(
        case.model, {case.site: layer_type.rank}, method=method.made_by, modules_to_save=["head"], **strength(method)
    )
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    _train(case, steps=3)
    changed = {name for name, tensor in case.model.state_dict().items() if not torch.equal(tensor, before[name])}
    ours = {name for name, _ in case.model.named_parameters() if ".adapters." in name}
    assert changed == ours | {"head.weight", "head.bias"}


def assert_every_part_learns(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Within three steps every adapter tensor has had a non-zero gradient, also after growing from rank 0."""
    for start in (layer_type.rank, 0):
        case = build_case(layer_type, dtype)
        adapter = attach_to(case, method, start)
        if start == 0:
            adapter.grow(layer_type.rows(layer_type.rank))
        touched: set[str] = set()

        def watch(adapter: Adapter = adapter, touched: set[str] = touched) -> None:
            for name, parameter in adapter.named_parameters():
                if parameter.grad is not None and parameter.grad.count_nonzero() > 0:
                    touched.add(name)

        _train(case, steps=3, watch=watch)
        assert touched == {name for name, _ in adapter.named_parameters()}


def assert_growth_is_continuous(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Growing keeps output, update and scaling."""
    case = build_case(layer_type, dtype)
    adapter = attach_to(case, method, 0 if layer_type.rank == 1 else 1)
    scaling = adapter.scaling
    randomise(adapter)
    before, delta = case.output(), delta_of(case, adapter)
    adapter.grow(layer_type.rows(layer_type.rank - adapter.rank))
    assert adapter.rank == layer_type.rank
    assert adapter.scaling == scaling
    assert_close(case.output(), before, GROWTH_TOLERANCE[dtype])
    assert_close(delta_of(case, adapter), delta, GROWTH_TOLERANCE[dtype])


def assert_shrink_loses_exactly_the_dropped_product(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """What a shrink drops and what it keeps add up to what was there; the scaling stays."""
    case, adapter = trained_case(method, layer_type, dtype)
    whole = delta_of(case, adapter)
    indices, scaling = list(range(adapter.rank)), adapter.scaling
    keep, drop = indices[::2][::-1], indices[1::2]
    dropped = deepcopy(adapter)
    dropped.shrink(drop)
    adapter.shrink(keep)
    assert adapter.rank == len(keep)
    assert adapter.scaling == dropped.scaling == scaling
    assert_close(delta_of(case, adapter) + delta_of(case, dropped), whole, PRODUCT_TOLERANCE[dtype])
    if drop:
        assert not torch.equal(delta_of(case, adapter), whole)
    else:
        assert torch.equal(delta_of(case, adapter), whole)
    assert torch.isfinite(case.output()).all()


def assert_rank_zero_is_a_normal_value(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """An adapter of rank 0 counts, merges and trains as nothing, grows, and is reached again by shrinking."""
    case = build_case(layer_type, dtype)
    adapter = attach_to(case, method, 0)
    base = case.weight.detach().clone()
    scaling = adapter.scaling
    assert adapter.rank == 0
    assert adapter.num_parameters() == 0
    assert delta_of(case, adapter).shape == adapter.operator.shape
    assert delta_of(case, adapter).count_nonzero() == 0
    merge(case.model)
    unmerge(case.model)
    assert torch.equal(case.weight, base)
    assert torch.equal(case.output(), case.base_output)
    adapter.grow(layer_type.rows(layer_type.rank))
    assert torch.equal(case.output(), case.base_output)
    randomise(adapter)
    assert adapter.num_parameters() == adapter.cost(layer_type.rank)
    assert adapter.cost(0) == 0
    assert not torch.equal(case.output(), case.base_output)
    adapter.shrink([])
    assert adapter.rank == 0
    assert adapter.scaling == scaling
    assert torch.equal(case.output(), case.base_output)


def assert_named_adapters_add_up(method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    """Two adapters on one layer add their updates, unmerged and merged."""
    case, first = trained_case(method, layer_type, dtype)
    second = attach_to(case, method, 1, adapter="second")
    randomise(second, seed=5)
    with disabled(case.model, "second"):
        one = case.output().double() - case.base_output.double()
    with disabled(case.model):
        other = case.output().double() - case.base_output.double()
    both = case.output()
    if layer_type.affine:
        assert_close(both, case.base_output.double() + one + other, MERGE_TOLERANCE[dtype])
    else:
        delta = first.operator.to_stored(delta_of(case, first) + delta_of(case, second))
        assert_close(both, _answer_with(case, delta), MERGE_TOLERANCE[dtype])
    merge(case.model)
    assert_close(case.output(), both, MERGE_TOLERANCE[dtype])
    unmerge(case.model)
    assert torch.equal(case.output(), both)


LAWS: Mapping[str, Callable[[Method, LayerType, torch.dtype], None]] = MappingProxyType({
    function.__name__.removeprefix("assert_"): function
    for function in (
        assert_identity_at_birth,
        assert_delta_weight_is_the_update,
        assert_merge_equals_unmerged,
        assert_second_merge_is_a_no_op,
        assert_unmerge_restores_bitwise,
        assert_unmerge_without_copy_restores_to_rounding,
        assert_second_unmerge_is_a_no_op,
        assert_disabling_restores_the_base,
        assert_only_adapters_learn,
        assert_every_part_learns,
        assert_growth_is_continuous,
        assert_shrink_loses_exactly_the_dropped_product,
        assert_rank_zero_is_a_normal_value,
        assert_named_adapters_add_up,
    )
})
