import dataclasses

import pytest
import torch

from flowra_compose import AdapterState, LowRankUpdate

A = torch.ones(2, 4)
B = torch.ones(3, 2)


def test_delta_weight_is_scaling_times_b_a() -> None:
    update = LowRankUpdate(A, B, 0.5)
    assert torch.equal(update.delta_weight(), torch.ones(3, 4))
    assert (update.rank, update.shape, update.dtype) == (2, (3, 4), torch.float32)


def test_half_precision_factors_multiply_in_float32() -> None:
    update = LowRankUpdate(A.bfloat16() * 0.1, B.bfloat16(), 1.0)
    assert update.dtype == torch.bfloat16
    assert update.delta_weight().dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "b", "scaling", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 1), 1.0, r"must be \(r, n\) and \(m, r\)"),
        (torch.ones(2, 4, 1), torch.ones(3, 2), 1.0, r"must be \(r, n\) and \(m, r\)"),
        (torch.ones(0, 4), torch.ones(3, 0), 1.0, "without an empty side"),
        (torch.ones(2, 4).long(), torch.ones(3, 2), 1.0, "must be float16"),
        (torch.full((2, 4), torch.nan), torch.ones(3, 2), 1.0, "must be finite"),
        (torch.ones(2, 4), torch.full((3, 2), torch.inf), 1.0, "must be finite"),
        (torch.ones(2, 4), torch.ones(3, 2), float("nan"), "must be finite"),
    ],
    ids=["ranks", "ndim", "rank-0", "integers", "nan-A", "inf-B", "nan-scaling"],
)
def test_factors_that_are_no_update_are_refused(a: torch.Tensor, b: torch.Tensor, scaling: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankUpdate(a, b, scaling)


@pytest.mark.parametrize("name", ["", "a..b", ".a", "a\nb", "a.lora_A", "\x00"])
def test_names_that_a_file_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names must be dotted module paths"):
        AdapterState(updates={name: LowRankUpdate(A, B)})


def test_heads_must_be_finite_named_and_apart_from_updates() -> None:
    state = AdapterState(updates={"fc": LowRankUpdate(A, B)})
    with pytest.raises(ValueError, match="names must be dotted module paths"):
        dataclasses.replace(state, modules_to_save={"weight": A})
    with pytest.raises(ValueError, match=r"NaN or infinity in 'head\.weight'"):
        dataclasses.replace(state, modules_to_save={"head.weight": A * torch.nan})
    with pytest.raises(ValueError, match=r"either adapted or trained in full .* got both: \['fc'\]"):
        dataclasses.replace(state, modules_to_save={"fc.weight": A})


def test_trained_modules_default_to_the_outermost_owners() -> None:
    state = AdapterState(updates={}, modules_to_save={"head.scale": A, "head.fc.weight": A, "norm.weight": A})
    assert state.trained_modules == ("head", "norm")


@pytest.mark.parametrize("modules", [("head", "other"), ("head.fc",), ("head", "head.fc")])
def test_trained_modules_that_do_not_fit_the_tensors_are_refused(modules: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="trained_modules must hold each tensor of modules_to_save once"):
        AdapterState(updates={}, modules_to_save={"head.fc.weight": A, "head.out.weight": A}, trained_modules=modules)
