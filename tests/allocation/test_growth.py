"""The gradient sketch against the dense normal component."""

import pytest
import torch
from torch import Tensor

from flowra_allocation import GradientSketch
from flowra_allocation.growth import leading_directions


def normal_component(a: Tensor, b: Tensor, gradient: Tensor) -> Tensor:
    """(I − P_B) G (I − P_A), dense, in float64."""
    a, b, gradient = a.double(), b.double(), gradient.double()
    left = torch.eye(len(b), dtype=torch.float64) - b @ torch.linalg.pinv(b)
    right = torch.eye(a.shape[1], dtype=torch.float64) - torch.linalg.pinv(a) @ a
    return left @ gradient @ right


def sketch_of(a: Tensor, b: Tensor, x: Tensor, g: Tensor, *, size: int = 10, batches: int = 1) -> GradientSketch:
    sketch = GradientSketch(a, b, generator=torch.Generator().manual_seed(3), size=size)
    for part_x, part_g in zip(x.chunk(batches), g.chunk(batches), strict=True):
        sketch.update(part_x, part_g)
    return sketch


@pytest.mark.parametrize(("m", "n", "r"), [(7, 9, 2), (12, 5, 3), (6, 6, 0), (30, 40, 4), (1, 8, 0)])
def test_energy_and_row_are_those_of_the_dense_normal_component(m: int, n: int, r: int) -> None:
    a, b, x, g = torch.randn(r, n), torch.randn(m, r), torch.randn(5, n), torch.randn(5, m)
    energy, row = sketch_of(a, b, x, g).leading_direction()
    _, sigma, vt = torch.linalg.svd(normal_component(a, b, g.T @ x))
    assert energy == pytest.approx(sigma[0].item() ** 2, rel=1e-3)
    assert abs(row.double() @ vt[0]).item() == pytest.approx(1, abs=1e-3)
    assert row.norm().item() == pytest.approx(1, abs=1e-5)
    assert row.shape == (n,)
    if r:
        assert (a @ row).abs().max() < 1e-4


def test_batches_add_up_to_the_whole() -> None:
    a, b, x, g = torch.randn(2, 6), torch.randn(5, 2), torch.randn(8, 6), torch.randn(8, 5)
    whole, parts = (sketch_of(a, b, x, g, batches=count).leading_direction() for count in (1, 4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    assert abs(parts[1] @ whole[1]).item() == pytest.approx(1, abs=1e-4)


def test_zero_columns_of_b_span_nothing() -> None:
    a, x, g = torch.randn(2, 6), torch.randn(4, 6), torch.randn(4, 5)
    b = torch.zeros(5, 2)
    energy, _ = sketch_of(a, b, x, g).leading_direction()
    sigma = torch.linalg.svdvals(normal_component(a, torch.zeros(5, 0), g.T @ x))
    assert energy == pytest.approx(sigma[0].item() ** 2, rel=1e-3)


def test_a_gradient_that_the_adapter_can_follow_leaves_nothing_to_grow() -> None:
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    x, g = torch.randn(4, 2) @ a, torch.randn(4, 5)
    energy, _ = sketch_of(a, b, x, g).leading_direction()
    assert energy < 1e-6 * (g.T @ x).square().sum().item()


def test_no_gradient_has_no_energy() -> None:
    energy, row = sketch_of(
        torch.randn(2, 6), torch.randn(5, 2), torch.zeros(1, 6), torch.zeros(1, 5)
    ).leading_direction()
    assert energy == 0
    assert torch.isfinite(row).all()


def test_equal_seeds_give_equal_bits() -> None:
    a, b, x, g = torch.randn(2, 6), torch.randn(5, 2), torch.randn(4, 6), torch.randn(4, 5)
    first, second = (sketch_of(a, b, x, g).leading_direction() for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_directions_of_many_sketches_at_once_are_those_of_each_alone() -> None:
    shapes = [(30, 40, 4), (6, 6, 0), (25, 50, 2), (3, 5, 3), (30, 40, 0)]  # the fourth has nothing left to follow
    sketches = [
        sketch_of(torch.randn(r, n), torch.randn(m, r), torch.randn(5, n), torch.randn(5, m)) for m, n, r in shapes
    ]
    sketches.append(sketch_of(torch.randn(4, 40), torch.randn(30, 4), torch.zeros(1, 40), torch.zeros(1, 30)))
    together = leading_directions(sketches)
    for (energy, row), sketch in zip(together, sketches, strict=True):
        expected, direction = sketch.leading_direction()
        assert energy == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(row * torch.sign(row @ direction), direction)
    assert [energy > 0 for energy, _ in together] == [True, True, True, False, True, False]
    assert [len(row) for _, row in together] == [40, 6, 50, 5, 40, 40]


def test_memory_is_linear_in_the_sides_of_the_weight() -> None:
    sketch = sketch_of(torch.randn(2, 400), torch.randn(300, 2), torch.randn(4, 400), torch.randn(4, 300), size=5)
    held = sum(value.numel() for value in vars(sketch).values() if isinstance(value, Tensor))
    assert held <= 400 * (5 + 2 + 11) + 300 * (5 + 2 + 11)
