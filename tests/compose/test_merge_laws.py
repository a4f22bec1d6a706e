"""The battery: every law over every rule and kind of adapters. All are laws of products ΔW, never of factors."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from compose.merge_table import (
    CORE,
    KINDS,
    ROWS,
    WEIGHTS,
    Kind,
    Products,
    Row,
    Statistics,
    Updates,
    product,
    products,
    random_update,
    statistics_for,
)
from flowra_compose import (
    RULES,
    AdapterState,
    LowRankUpdate,
    MergeOptions,
    TruncatedUpdate,
    Truncation,
    write_adapter,
)

# What rounding to the dtype of the factors may change, relative to the sizes of the inputs.
ROUNDING = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def sizes(adapters: Sequence[Updates], weights: Sequence[float]) -> dict[str, float]:
    """Return Σᵢ |wᵢ| max|ΔWᵢ| of each module."""
    found: dict[str, float] = {}
    for weight, one in zip(weights, adapters, strict=True):
        for name, update in one.items():
            found[name] = found.get(name, 0.0) + abs(weight) * float(product(update).abs().max())
    return found


def check_equal(found: Products, expected: Products, scale: Mapping[str, float], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        error = float((found[name] - delta).abs().max())
        assert error <= tolerance * scale[name] + 1e-300, (
            f"{name}: off by {error:.3g}, {error / (scale[name] or 1):.3g} of the inputs"
        )


def changed(
    adapters: Sequence[Updates], change: Callable[[LowRankUpdate, int], LowRankUpdate]
) -> list[dict[str, LowRankUpdate]]:
    return [{name: change(update, task) for name, update in sorted(one.items())} for task, one in enumerate(adapters)]


def check_same(
    row: Row, adapters: Sequence[Updates], others: Sequence[Sequence[Updates]], known: Sequence[Statistics]
) -> None:
    """Check that other forms of the same adapters give the same."""
    weights = WEIGHTS[: len(adapters)]
    expected = products(row.merge(adapters, weights, known))
    for form in others:
        check_equal(products(row.merge(form, weights, known)), expected, sizes(adapters, weights), row.tolerance)


# the laws; adapters are of float64 unless a law says otherwise


def identity(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """One adapter of weight 1 gives itself."""
    for one, own in zip(adapters, known, strict=True):
        check_equal(products(row.merge([one], [1.0], [own])), products(one), sizes([one], [1.0]), row.tolerance)


def copies(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """T copies give T times what one gives, or as much, or another power of T."""
    count = 2
    for one, own in zip(adapters, known, strict=True):
        single = products(row.merge([one], [1.0], [own]))
        expected = {name: count**row.copies * delta for name, delta in single.items()}
        found = products(row.merge([one] * count, [1.0] * count, [own] * count))
        check_equal(found, expected, sizes([one], [count]), row.tolerance)


def cancellation(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """An adapter and its negative give 0."""
    for one, own in zip(adapters, known, strict=True):
        found = products(row.merge([one, one], [1.0, -1.0], [own, own]))
        nothing = {name: torch.zeros_like(delta) for name, delta in found.items()}
        check_equal(found, nothing, sizes([one, one], [1, -1]), row.tolerance)


def order(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """The order of the adapters does not matter."""
    weights = WEIGHTS[: len(adapters)]
    expected = products(row.merge(adapters, weights, known))
    for turn in ([*range(1, len(adapters)), 0], [*range(len(adapters))][::-1]):
        found = row.merge(*([each[index] for index in turn] for each in (adapters, weights, known)))
        check_equal(products(found), expected, sizes(adapters, weights), row.tolerance)


def scale(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """Alpha against B, and B against A, changes nothing."""
    factors = (0.125, 3.0, -7.0, 1e4)

    def alpha(update: LowRankUpdate, task: int) -> LowRankUpdate:
        factor = factors[task]
        return replace(update, lora_B=update.lora_B / factor, scaling=update.scaling * factor)

    def balance(update: LowRankUpdate, task: int) -> LowRankUpdate:
        factor = factors[-1 - task]
        return replace(update, lora_A=update.lora_A * factor, lora_B=update.lora_B / factor)

    check_same(row, adapters, [changed(adapters, alpha), changed(adapters, balance)], known)


def factors(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """How a product is split into factors does not matter: by another basis, by more rank, or not split at all."""

    def basis(update: LowRankUpdate, task: int) -> LowRankUpdate:
        generator = torch.Generator().manual_seed(task)
        g = torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64)
        g = g + 3 * torch.linalg.qr(g).Q
        return replace(update, lora_A=torch.linalg.solve(g, update.lora_A), lora_B=update.lora_B @ g)

    def padded(update: LowRankUpdate, task: int) -> LowRankUpdate:
        a, b = update.lora_A, update.lora_B
        return replace(update, lora_A=torch.cat([a, a]), lora_B=torch.cat([b / 4, 3 * b / 4], dim=1))

    def whole(update: LowRankUpdate, task: int) -> LowRankUpdate:
        return LowRankUpdate.of_delta_weight(product(update), layout=update.layout, kernel=update.kernel)

    check_same(row, adapters, [changed(adapters, change) for change in (basis, padded, whole)], known)


def homogeneity(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """All weights times a number give that number times the update."""
    weights = WEIGHTS[: len(adapters)]
    expected = products(row.merge(adapters, weights, known))
    for factor in (-1.0, 0.3, 1e3):
        scaled = [factor * weight for weight in weights]
        found = products(row.merge(adapters, scaled, known))
        check_equal(
            found,
            {name: factor * delta for name, delta in expected.items()},
            sizes(adapters, scaled),
            row.tolerance,
        )


def weight_zero(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """An adapter of weight 0 takes no part, to the bit."""
    for out in range(len(adapters)):
        weights = [0.0 if task == out else weight for task, weight in enumerate(WEIGHTS[: len(adapters)])]
        found = row.merge(adapters, weights, known)
        rest = row.merge(*([*each[:out], *each[out + 1 :]] for each in (adapters, weights, known)))
        assert found.keys() == rest.keys()
        for name, update in found.items():
            assert torch.equal(update.lora_A, rest[name].lora_A)
            assert torch.equal(update.lora_B, rest[name].lora_B)


def layout(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """How ΔW lies in its parameter does not matter."""
    plain = changed(adapters, lambda update, task: LowRankUpdate(update.lora_A, update.lora_B, update.scaling))
    check_same(row, adapters, [plain], known)


def nothing(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """Updates of 0 give an update of 0."""
    zeros = changed(adapters, lambda update, task: replace(update, lora_B=torch.zeros_like(update.lora_B)))
    weights = WEIGHTS[: len(zeros)]
    merged = row.merge(zeros, weights, known)
    assert merged.keys() == {name for one in adapters for name in one}
    for update in merged.values():
        assert not product(update).any()


def form(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """The inputs are left alone, and not shared; what comes out has their layout, scaling 1 and a rank that fits."""
    before = changed(adapters, lambda u, task: replace(u, lora_A=u.lora_A.clone(), lora_B=u.lora_B.clone()))
    dtype = next(iter(adapters[0].values())).dtype
    merged = row.merge(adapters, WEIGHTS[: len(adapters)], known)
    assert list(merged) == sorted({name for one in adapters for name in one})
    inputs = {name: update for one in adapters for name, update in one.items()}
    for name, update in merged.items():
        assert update.scaling == 1.0
        assert update.lora_A.dtype == update.lora_B.dtype == dtype
        assert (update.layout, update.kernel) == (inputs[name].layout, inputs[name].kernel)
        assert update.parameter_shape == inputs[name].parameter_shape
        assert update.rank <= min(update.shape)
    for each in (merged, *(row.merge([one], [1.0], [own]) for one, own in zip(adapters, known, strict=True))):
        for update in each.values():
            update.lora_A.fill_(7)
            update.lora_B.fill_(7)
    for one, kept in zip(adapters, before, strict=True):
        for name, update in one.items():
            assert torch.equal(update.lora_A, kept[name].lora_A)
            assert torch.equal(update.lora_B, kept[name].lora_B)


def repeat(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """The same merge gives the same bytes, whatever was drawn before."""
    first = row.merge(adapters, WEIGHTS[: len(adapters)], known)
    torch.manual_seed(17)
    second = row.merge(adapters, WEIGHTS[: len(adapters)], known)
    for name, update in first.items():
        assert torch.equal(update.lora_A, second[name].lora_A)
        assert torch.equal(update.lora_B, second[name].lora_B)


def truncation(row: Row, adapters: Sequence[Updates], known: Sequence[Statistics]) -> None:
    """Truncated, it is the best approximation of what it is untruncated, in either metric, and says what was lost."""
    weights, rank = WEIGHTS[: len(adapters)], 2
    exact = products(row.merge(adapters, weights, known))
    scale = sizes(adapters, weights)
    for metric in ("frobenius", "moments"):
        found = row.merge(adapters, weights, known, truncation=Truncation(rank=rank, metric=metric))
        assert found.keys() == exact.keys()
        for name, update in found.items():
            left, right = roots(known, name, update.shape, metric)
            sigma = torch.linalg.svdvals(left @ exact[name] @ right)
            size = scale[name] * sum(update.shape) * float(left.norm() * right.norm())
            assert isinstance(update, TruncatedUpdate)
            assert update.rank <= rank
            count = len(update.singular_values)
            assert float((update.singular_values - sigma[:count]).abs().max()) <= row.tolerance * size
            assert float(sigma[count:].sum()) <= row.tolerance * size
            lost = float((left @ (exact[name] - product(update)) @ right).norm())
            assert lost == pytest.approx(float(sigma[rank:].norm()), rel=1e-6, abs=row.tolerance * size)
            assert update.loss**0.5 == pytest.approx(lost, rel=1e-6, abs=row.tolerance * size)


def roots(known: Sequence[Statistics], name: str, shape: tuple[int, int], metric: str) -> tuple[Tensor, Tensor]:
    """Return L and R such that the length of D in the metric is ‖L D R‖_F."""
    if metric == "frobenius":
        left, right = (torch.eye(side, dtype=torch.float64) for side in shape)
        return left, right
    return (
        torch.linalg.cholesky(sum_of_shrunk([one[name].outputs for one in known])).T,
        torch.linalg.cholesky(sum_of_shrunk([one[name].inputs for one in known])),
    )


def sum_of_shrunk(moments: Sequence[Tensor | None]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for moment in moments:
        assert moment is not None
        full = torch.diag(moment) if moment.ndim == 1 else moment
        total = total + 0.98 * full + 0.02 * full.diagonal().mean() * torch.eye(len(full), dtype=torch.float64)
    return total


Law = Callable[[Row, Sequence[Updates], Sequence[Statistics]], None]
LAWS: Mapping[str, Law] = MappingProxyType({
    law.__name__: law
    for law in (
        *(identity, copies, cancellation, order, scale, factors, homogeneity, weight_zero, layout, nothing, form),
        *(repeat, truncation),
    )
})

KIND_NAMES = [kind.name for kind in KINDS]
CORE_KINDS = [kind for kind in KINDS if kind.name in CORE]
EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
CASES = [
    pytest.param(
        law,
        row,
        kind,
        id=f"{law}-{row.name}-{kind.name}",
        marks=() if kind.name in CORE else pytest.mark.exhaustive,
    )
    for row in ROWS
    for kind in KINDS
    for law in LAWS
    if not row.excuse(law, kind.name)
]


@pytest.mark.parametrize(("law", "row", "kind"), CASES)
def test_law_holds(law: str, row: Row, kind: Kind) -> None:
    adapters = kind.adapters()
    LAWS[law](row, adapters, statistics_for(adapters))


def test_every_rule_has_a_row_and_every_row_a_rule() -> None:
    assert {row.rule for row in ROWS} == set(RULES)
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))


@EVERY_ROW
def test_every_exception_names_a_law_and_a_reason(row: Row) -> None:
    for key, reason in row.exceptions.items():
        law, _, kind = key.partition(":")
        assert law in LAWS
        assert not kind or kind in KIND_NAMES
        assert reason.strip()


@pytest.mark.parametrize(
    ("row", "key"),
    [pytest.param(row, key, id=f"{row.name}-{key}") for row in ROWS for key in row.exceptions],
)
def test_every_exception_is_needed(row: Row, key: str) -> None:
    law, _, kind = key.partition(":")
    broken = []
    for each in KINDS:
        if kind in ("", each.name):
            adapters = each.adapters()
            try:
                LAWS[law](row, adapters, statistics_for(adapters))
            except AssertionError:
                broken.append(each.name)
    assert broken


# dtypes


@EVERY_ROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_costs_its_rounding_only(row: Row, dtype: torch.dtype) -> None:
    for kind in CORE_KINDS:
        adapters = kind.adapters(dtype)
        known = statistics_for(adapters)
        form(row, adapters, known)
        wide = kind.adapters(dtype)  # the same values
        exact = products(row.merge(_doubled(wide), WEIGHTS, known))
        found = products(row.merge(wide, WEIGHTS, known))
        for name, delta in exact.items():
            error = float((found[name] - delta).norm())
            size = float(delta.norm()) + 1e-3 * sizes(wide, WEIGHTS)[name]
            assert error <= ROUNDING[dtype] * size, f"{kind.name}, {name}: {error / size:.3g}"


def _doubled(adapters: Sequence[Updates]) -> list[dict[str, LowRankUpdate]]:
    return changed(adapters, lambda u, task: replace(u, lora_A=u.lora_A.double(), lora_B=u.lora_B.double()))


# chance


@pytest.mark.parametrize("row", [row for row in ROWS if row.draws], ids=lambda row: row.name)
def test_another_seed_draws_otherwise(row: Row) -> None:
    adapters = KINDS[0].adapters()
    known = statistics_for(adapters)
    options = row.options or MergeOptions()
    first, second = (
        products(replace(row, options=replace(options, seed=seed)).merge(adapters, WEIGHTS, known)) for seed in (1, 2)
    )
    assert all(float((first[name] - second[name]).norm()) > 1e-3 for name in first)


# any shape


@st.composite
def any_adapters(draw: st.DrawFn) -> list[Updates]:
    """One to three adapters over up to two modules, of any ranks and sides, with partly overlapping targets."""
    sides = st.integers(1, 7)
    shapes = draw(st.dictionaries(st.sampled_from("ab"), st.tuples(sides, sides), min_size=1))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    first_seed = draw(st.integers(0, 10**6))
    count = draw(st.integers(1, 3))
    return [
        {
            name: random_update(
                *shapes[name], draw(st.integers(1, 8)), seed=first_seed + 10 * task + index, scaling=draw(scalings)
            )
            for index, name in enumerate(sorted(shapes))
            if task == 0 or draw(st.booleans())
        }
        for task in range(count)
    ]


ANY_SHAPE = (identity, cancellation, order, scale, factors, homogeneity, nothing, form, truncation)


@EVERY_ROW
@settings(max_examples=30)
@given(law=st.sampled_from(ANY_SHAPE), adapters=any_adapters())
def test_laws_hold_for_adapters_of_any_shape(row: Row, law: Law, adapters: list[Updates]) -> None:
    if not row.excuse(law.__name__, "any_shape"):
        law(row, adapters, statistics_for(adapters))


# reload


def _contiguous(update: LowRankUpdate, task: int) -> LowRankUpdate:
    return replace(update, lora_A=update.lora_A.contiguous(), lora_B=update.lora_B.contiguous())


RELOAD = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from flowra_compose import read_adapter, write_adapter
for folder in sorted(Path(sys.argv[1]).iterdir()):
    state = read_adapter(folder / "adapter")
    write_adapter(state, folder / "again")
    save_file({name: update.delta_weight() for name, update in state.updates.items()}, folder / "products.safetensors")
"""


def test_what_every_rule_makes_is_the_same_in_a_fresh_process_and_written_again_has_the_same_bytes(
    tmp_path: Path,
) -> None:
    expected: dict[str, dict[str, Tensor]] = {}
    for row in ROWS:
        for kind in KINDS:
            adapters = kind.adapters(torch.float32)
            merged = row.merge(adapters, WEIGHTS, statistics_for(adapters))
            case = f"{row.name}-{kind.name}"
            write_adapter(AdapterState(updates=merged), tmp_path / case / "adapter")
            laid_out = changed([merged], _contiguous)[
                0
            ]  # as read from a file: how it lies in memory decides the last bit
            expected[case] = {name: update.delta_weight() for name, update in laid_out.items()}
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True)
    for case, deltas in expected.items():
        found = load_file(tmp_path / case / "products.safetensors")
        assert found.keys() == deltas.keys()
        assert all(torch.equal(found[name], delta) for name, delta in deltas.items()), case
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            written = [(tmp_path / case / folder / file).read_bytes() for folder in ("adapter", "again")]
            assert written[0] == written[1], case
