import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import MomentMatrix, SecondMoment, fisher_trace, kronecker_factors, per_example_signals

NAMES = ["up", "shared", "head"]
Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """``up`` sees tokens, ``shared`` sees them twice, ``head`` one vector for each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.shared, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.up(x))))))
        out: Tensor = self.head((h * mask[..., None]).sum(1))
        return out


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for num, length in [(4, 5), (3, 2)]:
        lengths = torch.randint(1, length + 1, (num, 1), generator=generator)
        mask = torch.arange(length) < lengths
        made.append((torch.randn(num, length, 6, dtype=torch.float64, generator=generator), mask))
    return made


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch).square().sum(1)


def mask_of(batch: Batch) -> Tensor:
    return batch[1]


def whole(moment: MomentMatrix) -> Tensor:
    return moment.matmul(torch.eye(len(moment.diagonal), dtype=moment.diagonal.dtype))


def exact(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """C and S token by token, from autograd on one unpadded example at a time."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NAMES}

    def keep(name: str, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        calls[name].append((args[0].detach(), output))

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: keep(name, args, out))
        for name in NAMES
    ]
    num = 0
    for inputs, mask in batches():
        for x, real in zip(inputs, mask, strict=True):
            loss(model, (x[real][None], real[real][None])).sum().backward()
            num += 1
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    found = {}
    for name, seen in calls.items():
        pairs = [(inputs.flatten(0, -2), output.grad.flatten(0, -2)) for inputs, output in seen]
        tokens = [token for inputs, gradients in pairs for token in zip(inputs, gradients, strict=True)]
        C = sum(torch.outer(x, x) for x, _ in tokens) / len(tokens)
        S = sum(torch.outer(g, g) for _, g in tokens) / num
        found[name] = (C, S)
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_factors_of_a_padded_batch_are_those_of_per_token_autograd_without_padding(frozen: bool) -> None:
    model = Network()
    expected = exact(model)
    found = kronecker_factors(model.requires_grad_(not frozen), batches(), loss, NAMES, mask=mask_of)
    assert list(found) == NAMES
    for name, (C, S) in expected.items():
        torch.testing.assert_close(whole(found[name].inputs), C, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(whole(found[name].gradients), S, rtol=1e-10, atol=1e-13)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sketched_factors_have_the_exact_diagonal_and_with_enough_columns_are_exact() -> None:
    model = Network()
    expected = exact(model)
    rough = kronecker_factors(model, batches(), loss, NAMES, dense_limit=0, size=2, mask=mask_of)
    for name, moments in expected.items():
        for moment, matrix in zip(rough[name], moments, strict=True):
            assert moment.low_rank is not None
            torch.testing.assert_close(moment.diagonal, matrix.diagonal(), rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(whole(moment).diagonal(), matrix.diagonal(), rtol=1e-8, atol=1e-13)
    (enough,) = kronecker_factors(model, batches(), loss, ["head"], dense_limit=0, size=8, mask=mask_of).values()
    C, _ = expected["head"]  # of rank 7, since there are seven examples, and of size 9
    assert enough.inputs.low_rank is not None
    torch.testing.assert_close(whole(enough.inputs), C, rtol=0, atol=1e-8 * float(C.norm()))


def products(num_tokens: int) -> Batch:
    """Examples in which inputs and output gradients take all combinations, the gradients with both signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    g = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    g = torch.cat([g, -g])
    inputs = itertools.product(x, repeat=num_tokens)
    gradients = list(itertools.product(g, repeat=num_tokens))
    pairs = [(torch.stack(a), torch.stack(b)) for a in inputs for b in gradients]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def given_gradient(model: nn.Module, batch: Batch) -> Tensor:
    x, g = batch
    return (model(x) * g).sum((1, 2))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_where_inputs_and_gradients_are_independent_the_traces_multiply_to_that_of_the_fisher(num_tokens: int) -> None:
    model, data = nn.Linear(5, 3).double(), [products(num_tokens)]
    C, S = kronecker_factors(model, data, given_gradient, [""])[""]
    trace = fisher_trace(model, data, given_gradient, [""])[""].mean
    assert C.trace() * S.trace() == pytest.approx(trace, rel=1e-12)


def test_with_one_token_and_independence_the_kronecker_product_is_the_fisher() -> None:
    x, g = products(1)
    C, S = kronecker_factors(nn.Linear(5, 3).double(), [(x, g)], given_gradient, [""])[""]
    vec = torch.einsum("ntm,ntk->nkm", g, x).flatten(1)  # columns of G stacked
    torch.testing.assert_close(torch.kron(whole(C), whole(S)), vec.T @ vec / len(vec))


def test_scaling_the_loss_scales_only_the_gradients_and_by_its_square() -> None:
    model = Network()
    once = kronecker_factors(model, batches(), loss, NAMES)
    thrice = kronecker_factors(model, batches(), lambda model, batch: 3 * loss(model, batch), NAMES)
    for name in NAMES:
        torch.testing.assert_close(whole(thrice[name].inputs), whole(once[name].inputs))
        torch.testing.assert_close(whole(thrice[name].gradients), 9 * whole(once[name].gradients))


def test_the_trace_of_c_is_the_mean_squared_length_of_real_tokens_only() -> None:
    x, mask = batches()[0]
    factors = kronecker_factors(Network(), [(x, mask)], loss, ["up"], mask=mask_of)["up"]
    assert factors.inputs.trace() == pytest.approx(float(x[mask].square().sum() / mask.sum()))
    unmasked = kronecker_factors(Network(), [(x, mask)], loss, ["up"])["up"]
    assert unmasked.inputs.trace() == pytest.approx(float(x.square().sum() / mask.numel()))
    assert unmasked.gradients.trace() == pytest.approx(factors.gradients.trace())


def test_two_processes_that_share_the_data_get_together_what_one_gets() -> None:
    model = Network()
    expected = kronecker_factors(model, batches(), loss, ["shared"], dense_limit=0, size=4, seed=3)["shared"]
    states = []
    for part in batches():
        state = SecondMoment.init(9, per="token", dense_limit=0, size=4, seed=3, dtype=torch.float64)
        for batch in per_example_signals(model, [part], loss, ["shared"]):
            state = state.update(batch["shared"].x, batch["shared"].real)
        states.append(state)
    merged = states[0].merge(states[1]).finalise()
    torch.testing.assert_close(whole(merged), whole(expected.inputs))


def test_half_precision_signals_are_accumulated_in_float32() -> None:
    layer = nn.Linear(4, 2, dtype=torch.bfloat16)
    x = torch.ones(2, 1000, 4, dtype=torch.bfloat16)
    C, S = kronecker_factors(layer, [x], lambda model, x: model(x).sum((1, 2)), [""])[""]
    assert C.diagonal.dtype == S.diagonal.dtype == torch.float32
    torch.testing.assert_close(C.diagonal, torch.ones(4))
    torch.testing.assert_close(S.diagonal, torch.full((2,), 1000.0))


def test_a_batch_that_is_not_finite_is_named_with_its_module() -> None:
    bad = torch.full((2, 4), math.nan)
    with pytest.raises(ValueError, match=r"vectors must be finite.* For module '', batch 1\."):
        kronecker_factors(nn.Linear(4, 2), [torch.ones(2, 4), bad], lambda model, x: model(x).sum(1), [""])
    with pytest.raises(ValueError, match=r"batches must hold at least one example, got none"):
        kronecker_factors(nn.Linear(4, 2), [], lambda model, x: model(x).sum(1), [""])
