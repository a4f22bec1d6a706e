import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_analysis import (
    Alignment,
    AlignmentHistory,
    GradientSketch,
    Signals,
    orthonormal_basis,
    subspace_alignment,
    subspace_overlap,
)

M, N, R = 7, 9, 3
SHARES = ("right_share", "left_share", "both_share", "tangent_share")
OVERLAPS = ("right_overlap", "left_overlap")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(vectors: Tensor) -> Tensor:
    """Onto the columns, by the normal equations."""
    return vectors @ torch.linalg.inv(vectors.T @ vectors) @ vectors.T


def alignment(*, step: float = 0.5, rank: int = 2) -> Alignment:
    return Alignment(
        shape=(4, 10),
        rank_A=rank,
        rank_B=1,
        leading=3,
        right_share=step,
        left_share=0.25,
        both_share=step / 4,
        right_overlap=step,
        left_overlap=0.0,
        uncertainty=0.0,
    )


def test_shares_are_those_of_explicit_projectors() -> None:
    a, b, g = drawn(R, N), drawn(M, R, seed=1), drawn(M, N, seed=2)
    found = subspace_alignment(a, b, g, leading=4)
    p_a, p_b, whole = projector(a.T), projector(b), g.square().sum()
    assert found.right_share == pytest.approx(float((g @ p_a).square().sum() / whole), rel=1e-12)
    assert found.left_share == pytest.approx(float((p_b @ g).square().sum() / whole), rel=1e-12)
    assert found.both_share == pytest.approx(float((p_b @ g @ p_a).square().sum() / whole), rel=1e-12)
    outside = (torch.eye(M) - p_b) @ g @ (torch.eye(N) - p_a)
    assert found.tangent_share == pytest.approx(1 - float(outside.square().sum() / whole), rel=1e-12)
    assert (found.shape, found.rank_A, found.rank_B, found.leading) == ((M, N), R, R, 4)
    assert found.uncertainty == 0


@pytest.mark.parametrize("leading", [1, R, M])
def test_overlaps_are_squared_cosines_of_the_principal_angles(leading: int) -> None:
    a, b, g = drawn(R, N), drawn(M, R, seed=1), drawn(M, N, seed=2)
    found = subspace_alignment(a, b, g, leading=leading)
    u, _, vt = torch.linalg.svd(g)
    smaller = min(leading, R)
    for phi, space, vectors in ((found.right_overlap, a.T, vt.T), (found.left_overlap, b, u)):
        cosines = torch.linalg.svdvals(torch.linalg.qr(space).Q.T @ vectors[:, :leading])
        assert phi == pytest.approx(float(cosines.square().sum()) / smaller, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    exponents=st.lists(st.floats(-6, 6), min_size=R, max_size=R),
    loss_scale=st.floats(-8, 8),
)
def test_alignment_does_not_depend_on_scale_or_basis(seed: int, exponents: list[float], loss_scale: float) -> None:
    a, b, g = drawn(R, N, seed=seed), drawn(M, R, seed=seed + 1), drawn(M, N, seed=seed + 2)
    rotation = torch.linalg.qr(drawn(R, R, seed=seed + 3)).Q
    scale = 10.0 ** torch.tensor(exponents[:1], dtype=torch.float64)
    before = subspace_alignment(a, b, g, leading=2)
    after = subspace_alignment(scale * rotation.T @ a, b @ rotation / scale, 10.0**loss_scale * g, leading=2)
    for name in (*SHARES, *OVERLAPS):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-10)
    mild = (10.0 ** (torch.tensor(exponents, dtype=torch.float64) / 6)).diag()  # each direction by its own factor
    uneven = subspace_alignment(mild @ a, b @ mild.inverse(), g, leading=2)
    assert uneven.right_share == pytest.approx(before.right_share, abs=1e-10)
    assert uneven.left_overlap == pytest.approx(before.left_overlap, abs=1e-10)


def test_the_whole_space_holds_the_whole_gradient() -> None:
    found = subspace_alignment(drawn(M, N), drawn(M, M, seed=1), drawn(M, N, seed=2), leading=M)
    assert found.left_share == pytest.approx(1, abs=1e-12)
    assert found.left_overlap == pytest.approx(1, abs=1e-12)
    assert found.both_share == pytest.approx(found.right_share, abs=1e-12)
    assert found.expected_left_share == found.expected_left_overlap == 1


def test_leading_singular_directions_hold_the_leading_energy() -> None:
    g = drawn(M, N)
    u, sigma, vt = torch.linalg.svd(g, full_matrices=False)
    found = subspace_alignment(vt[:R], u[:, :R], g, leading=R)
    share = float(sigma[:R].square().sum() / sigma.square().sum())
    for name in ("right_share", "left_share", "both_share"):
        assert getattr(found, name) == pytest.approx(share, rel=1e-12)
    assert found.right_overlap == pytest.approx(found.left_overlap, abs=2e-16) == pytest.approx(1, abs=1e-12)
    trailing = subspace_alignment(vt[R:], u[:, R:], g, leading=R)
    assert trailing.right_overlap == pytest.approx(0, abs=1e-12)
    assert trailing.left_share == pytest.approx(1 - share, rel=1e-12)


def test_leading_singular_directions_of_a_diagonal_gradient_overlap_with_them_exactly() -> None:
    g, eye = torch.zeros(M, N, dtype=torch.float64), torch.eye(max(M, N), dtype=torch.float64)
    g.diagonal().copy_(torch.arange(min(M, N), 0, -1))
    found = subspace_alignment(eye[:R, :N], eye[:M, :R], g, leading=R)
    assert found.right_overlap == found.left_overlap == 1


def test_random_subspaces_have_the_expected_values() -> None:
    g, count = drawn(20, 30), 2000
    found = [
        subspace_alignment(drawn(R, 30, seed=2 * i + 1), drawn(20, R, seed=2 * i + 2), g, leading=5)
        for i in range(count)
    ]
    for name in (*SHARES, *OVERLAPS):
        values = torch.tensor([getattr(each, name) for each in found], dtype=torch.float64)
        expected = getattr(found[0], f"expected_{name}")
        error = float(values.std() / math.sqrt(count))
        assert abs(float(values.mean()) - expected) < 4 * error
        assert error < 0.02 * expected  # so that the interval says something
    assert found[0].expected_right_share == R / 30
    assert found[0].expected_left_overlap == 5 / 20


def test_lora_at_birth_has_no_left_subspace() -> None:
    found = subspace_alignment(drawn(R, N), torch.zeros(M, R), drawn(M, N, seed=1), leading=2)
    assert (found.rank_A, found.rank_B) == (R, 0)
    assert found.left_share == found.both_share == found.left_overlap == 0
    assert found.expected_left_share == found.expected_left_overlap == 0
    assert found.tangent_share == found.right_share > 0


def test_dependent_directions_count_once() -> None:
    a, b, g = drawn(R, N), drawn(M, R, seed=1), drawn(M, N, seed=2)
    doubled = subspace_alignment(torch.cat([a, a[:1] * 7]), torch.cat([b, torch.zeros(M, 1)], 1), g, leading=2)
    plain = subspace_alignment(a, b, g, leading=2)
    assert (doubled.rank_A, doubled.rank_B) == (R, R)
    assert doubled.right_share == pytest.approx(plain.right_share, rel=1e-12)
    assert doubled.left_share == pytest.approx(plain.left_share, rel=1e-12)


def test_an_adapter_of_rank_zero_holds_nothing() -> None:
    found = subspace_alignment(torch.zeros(0, N), torch.zeros(M, 0), drawn(M, N), leading=2)
    assert found.tangent_share == found.right_overlap == found.left_overlap == found.expected_tangent_share == 0


def test_a_zero_gradient_has_no_direction() -> None:
    found = subspace_alignment(drawn(R, N), drawn(M, R), torch.zeros(M, N), leading=2)
    assert found.leading == 0
    assert found.tangent_share == found.right_overlap == found.expected_right_overlap == found.uncertainty == 0


def test_a_gradient_of_low_rank_has_no_more_leading_directions() -> None:
    g = (drawn(M, 2) @ drawn(2, N, seed=1)).float()
    found = subspace_alignment(drawn(R, N), drawn(M, R), g, leading=6)
    assert found.leading == 2


def test_a_sketch_of_a_gradient_of_low_rank_gives_the_exact_alignment() -> None:
    x, g = drawn(4, 5, 2) @ drawn(2, 40, seed=1), drawn(4, 5, 30, seed=2)
    exact = torch.einsum("ntm,ntk->mk", g, x) / 4
    a, b = drawn(R, 40, seed=3), drawn(30, R, seed=4)
    sketch = GradientSketch.init((30, 40), size=6, dtype=torch.float64).update(Signals(x, g)).finalise()
    found, expected = subspace_alignment(a, b, sketch, leading=2), subspace_alignment(a, b, exact, leading=2)
    for name in (*SHARES, *OVERLAPS):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9)
    assert found.uncertainty < 1e-9


def test_shares_of_a_sketch_are_within_its_uncertainty() -> None:
    decay = 0.8 ** torch.arange(30, dtype=torch.float64)
    x, g = drawn(1, 30, 40) * decay[:, None], drawn(1, 30, 30, seed=1)
    exact = g[0].T @ x[0]
    a, b = drawn(R, 40, seed=3), drawn(30, R, seed=4)
    sketch = GradientSketch.init((30, 40), size=8, dtype=torch.float64).update(Signals(x, g)).finalise()
    found, expected = subspace_alignment(a, b, sketch, leading=2), subspace_alignment(a, b, exact, leading=2)
    assert 0.01 < found.uncertainty < 0.9
    for name in ("right_share", "left_share", "both_share"):
        gap = abs(math.sqrt(getattr(found, name)) - math.sqrt(getattr(expected, name)))
        assert gap < 2 * found.uncertainty  # itself an estimate, by ten probes


def test_factors_in_bfloat16_have_their_own_rank() -> None:
    a, b = drawn(R, 300).bfloat16(), drawn(200, R, seed=1).bfloat16()
    found = subspace_alignment(a, b, drawn(200, 300).bfloat16(), leading=2)
    assert (found.rank_A, found.rank_B) == (R, R)
    wide = subspace_alignment(a.double(), b.double(), drawn(200, 300).bfloat16().double(), leading=2)
    assert found.right_share == pytest.approx(wide.right_share, rel=1e-12)


def test_basis_is_orthonormal_and_spans_the_vectors() -> None:
    vectors = drawn(8, 3) @ torch.diag(torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64))
    basis = orthonormal_basis(vectors)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    unit = vectors / vectors.norm(dim=0)
    torch.testing.assert_close(basis @ (basis.T @ unit), unit, rtol=0, atol=1e-9)


def test_wrong_arguments_are_refused() -> None:
    g = drawn(M, N)
    with pytest.raises(ValueError, match=r"lora_A and lora_B must have shapes \(r, 9\) and \(7, r\), got \(3, 7\)"):
        subspace_alignment(drawn(R, M), drawn(M, R), g)
    with pytest.raises(ValueError, match=r"lora_A and lora_B must have shapes"):
        subspace_alignment(drawn(R, N), drawn(M, R + 1), g)
    for leading in (0, M + 1):
        with pytest.raises(ValueError, match=rf"leading must be in \[1, 7\], got {leading}"):
            subspace_alignment(drawn(R, N), drawn(M, R), g, leading=leading)
    with pytest.raises(ValueError, match="vectors must be finite"):
        subspace_alignment(drawn(R, N) * torch.nan, drawn(M, R), g, leading=2)
    with pytest.raises(ValueError, match=r"gradient must be a finite matrix \(m, n\)"):
        subspace_alignment(drawn(R, N), drawn(M, R), g / 0, leading=2)
    with pytest.raises(ValueError, match="first and second must have shapes"):
        subspace_overlap(torch.eye(3), torch.eye(4))


def test_phases_average_over_checkpoints_then_over_modules() -> None:
    history = AlignmentHistory()
    for step, value in ((0, 0.1), (499, 0.3), (500, 0.5), (2000, 0.9)):
        history = history.update(step, {"q": alignment(step=value), "v": alignment(step=value / 2, rank=4)})
    phases = history.phases()
    assert [(each.start, each.end, each.checkpoints, each.modules) for each in phases] == [
        (0, 500, 2, 2),
        (500, 1000, 1, 2),
        (2000, None, 1, 2),
    ]
    first = phases[0]
    assert first.mean["right_share"] == pytest.approx((0.2 + 0.1) / 2)
    assert first.deviation["right_share"] == pytest.approx(0.05)
    assert (first.low["right_share"], first.high["right_share"]) == pytest.approx((0.1, 0.2))
    assert first.expected["right_share"] == pytest.approx((2 + 4) / 2 / 10)
    assert first.expected["left_overlap"] == pytest.approx(3 / 4)
    assert first.mean["tangent_share"] == pytest.approx(0.15 + 0.25 - 0.15 / 4)


def test_phase_bounds_are_a_parameter() -> None:
    history = AlignmentHistory()
    for step in range(6):
        history = history.update(step, {"q": alignment(step=step / 10)})
    assert [each.mean["right_share"] for each in history.phases((3,))] == pytest.approx([0.1, 0.4])
    assert len(history.phases(())) == 1
    for bounds in ((0,), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match="bounds must be ascending and > 0"):
            history.phases(bounds)


def test_a_module_that_came_later_has_the_mean_over_its_own_steps() -> None:
    history = AlignmentHistory().update(0, {"q": alignment(step=0.2)})
    history = history.update(10, {"q": alignment(step=0.4), "v": alignment(step=1.0)})
    assert history.phases()[0].mean["right_share"] == pytest.approx((0.3 + 1.0) / 2)
    assert AlignmentHistory().phases() == []


def test_histories_merge_whatever_the_order() -> None:
    one = AlignmentHistory().update(20, {"q": alignment()}).update(0, {"q": alignment()})
    two = AlignmentHistory().update(0, {"v": alignment(step=0.1)})
    assert list(one.steps) == [0, 20]
    assert one.merge(two) == two.merge(one)
    with pytest.raises(ValueError, match=r"hold each module once, got \['q'\] twice at 0"):
        one.update(0, {"q": alignment()})
    with pytest.raises(ValueError, match="steps must be ≥ 0"):
        one.update(-1, {"q": alignment()})


def test_a_history_comes_back_from_json_as_it_was() -> None:
    measured = subspace_alignment(drawn(R, N), drawn(M, R), drawn(M, N, seed=1), leading=2)
    history = AlignmentHistory().update(0, {"q": measured}).update(50, {"q": alignment(), "v": alignment()})
    text = json.dumps(history.as_json(), allow_nan=False)
    assert AlignmentHistory.from_json(json.loads(text)) == history


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "content must hold format_version 1 and steps, got 2"),
        ({"more": 1}, "content must hold format_version 1 and steps"),
        ({"steps": []}, "steps must be an object, got list"),
        ({"steps": {"-1": {}}}, "steps must be whole numbers ≥ 0, got '-1'"),
        ({"steps": {"1": [1]}}, r"steps must hold objects, got \[1\] at step 1"),
        ({"steps": {"1": {"q": {"shape": [1, 2]}}}}, "keys must be .* for module 'q' at step 1"),
    ],
)
def test_damaged_json_is_refused(change: dict[str, object], message: str) -> None:
    content = AlignmentHistory().update(1, {"q": alignment()}).as_json()
    with pytest.raises(ValueError, match=message):
        AlignmentHistory.from_json({**content, **change})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("right_share", math.nan),
        ("right_share", "1"),
        ("shape", [0, 3]),
        ("shape", 3),
        ("rank_A", 1.5),
        ("leading", -1),
    ],
)
def test_damaged_values_are_refused(key: str, value: object) -> None:
    content = AlignmentHistory().update(1, {"q": alignment()}).as_json()
    content["steps"]["1"]["q"][key] = value
    with pytest.raises(ValueError, match=r"must be (finite|whole) numbers.* for module 'q' at step 1"):
        AlignmentHistory.from_json(content)


@pytest.mark.parametrize(("key", "value"), [("right_share", 17.0), ("left_overlap", -0.1), ("uncertainty", -1.0)])
def test_impossible_shares_are_refused(key: str, value: float) -> None:
    content = AlignmentHistory().update(1, {"q": alignment()}).as_json()
    content["steps"]["1"]["q"][key] = value
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\] and the uncertainty ≥ 0, got .* for module 'q'"):
        AlignmentHistory.from_json(content)
