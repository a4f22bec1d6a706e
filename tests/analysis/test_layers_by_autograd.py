"""Σ_t g_t x_tᵀ is the gradient of every kind of layer's weight, example by example, against autograd in float64."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flowra_analysis import (
    EmpiricalFisher,
    GradientSketch,
    GradientSpectra,
    Signals,
    gradient_spectra,
    measure,
    per_example_signals,
    weight_matrix,
)

Layer = Callable[[], tuple[nn.Module, Tensor]]
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}
SPACE = {1: (9,), 2: (7, 6), 3: (5, 5, 6)}


def convolution(dims: int, *, transposed: bool, groups: int, strided: bool, padding: str | int) -> Layer:
    def build() -> tuple[nn.Module, Tensor]:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # noqa: E501  # fmt: skip
        options: dict[str, object] = {"groups": groups, "stride": 2, "dilation": 2} if strided else {"groups": groups}
        if transposed:
            options |= {"output_padding": 1} if strided else {}
            options["padding"] = padding
        elif isinstance(padding, int):
            options["padding"] = padding
        else:
            options |= {"padding": 1, "padding_mode": padding}
        return kinds[dims - 1](4, 6, KERNELS[dims], **options), torch.randn(3, 4, *SPACE[dims])

    return build


def same_padding() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), torch.randn(3, 4, 7, 6)


def embedding(padding_idx: int | None) -> Layer:
    def build() -> tuple[nn.Module, Tensor]:
        return nn.Embedding(11, 5, padding_idx=padding_idx), torch.tensor([[1, 2, 2, 0], [0, 0, 7, 3], [9, 1, 1, 1]])

    return build


LAYERS: dict[str, Layer] = {
    "linear": lambda: (nn.Linear(4, 6), torch.randn(3, 5, 4)),
    "linear on an image": lambda: (nn.Linear(4, 6), torch.randn(3, 2, 5, 4)),
    "linear, pooled": lambda: (nn.Linear(4, 6), torch.randn(3, 4)),
    "conv1d of transformers": lambda: (Conv1D(6, 4), torch.randn(3, 5, 4)),
    "embedding": embedding(None),
    "embedding with a padding id": embedding(0),
    "embedding, one id each": lambda: (nn.Embedding(11, 5, padding_idx=0), torch.tensor([3, 0, 1])),
    "conv, same padding": same_padding,
    **{
        f"conv{dims}d{', transposed' * transposed}, {groups} groups{', strided and dilated' * strided}, {padding}": (
            convolution(dims, transposed=transposed, groups=groups, strided=strided, padding=padding)
        )
        for dims, transposed, groups, strided in itertools.product((1, 2, 3), (False, True), (1, 2), (False, True))
        for padding in ((0, 1) if transposed else (0, 1, "reflect", "replicate", "circular"))
    },
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), torch.randn(3, 4, 6, 6)),
}


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    return layer.double(), x.double() if x.is_floating_point() else x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).flatten(1)
    return (y.tanh() * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)).sum(1)


def gradients(layer: nn.Module, x: Tensor) -> Tensor:
    """Per-example gradients of the weight matrix ``(N, m, n)``, one backward pass each."""
    assert isinstance(layer.weight, nn.Parameter)
    found = []
    for example in x.split(1):
        (gradient,) = torch.autograd.grad(loss(layer, example).sum(), layer.weight)
        twin = copy.copy(layer)  # the same layout, of the gradient
        twin._parameters = {"weight": nn.Parameter(gradient)}
        found.append(weight_matrix(twin).detach())
    return torch.stack(found)


def from_signals(signals: Signals) -> Tensor:
    x, g = signals.by_group()
    made = torch.einsum("gntm,gntk->ngmk", g, x).flatten(1, 2)
    if signals.columns is None:
        return made
    wide = made.new_zeros(*made.shape[:2], signals.weight_shape[1])
    wide[..., signals.columns] = made
    return wide


@pytest.mark.parametrize("kind", LAYERS)
def test_signals_give_each_example_s_gradient_of_every_kind_of_layer(kind: str) -> None:
    layer, x = build(kind)
    expected = gradients(layer, x)
    (signals,) = per_example_signals(layer.requires_grad_(False), [x], loss, [""])
    assert signals[""].weight_shape == weight_matrix(layer).shape == expected.shape[1:]
    torch.testing.assert_close(from_signals(signals[""]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_fisher_trace_and_gradient_spectrum_of_every_kind_of_layer_are_those_of_autograd(kind: str) -> None:
    layer, x = build(kind)
    expected = gradients(layer, x)
    begun = {"fisher": EmpiricalFisher.init(), "gradient": GradientSpectra.init(size=64)}
    seen = measure(layer, [x[:2], x[2:]], loss, [""], begun)
    assert seen["fisher"].finalise()[""].mean == pytest.approx(float(expected.square().sum((1, 2)).mean()), rel=1e-10)
    sigma = torch.linalg.svdvals(expected.mean(0))
    torch.testing.assert_close(
        seen["gradient"].finalise()[""].singular_values, sigma, rtol=1e-8, atol=1e-9 * float(sigma[0])
    )


class Tied(nn.Module):
    """A text model whose head is its embedding, ``h`` between them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.h, self.head = nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.h(self.h(self.embed(ids)).tanh()).cumsum(1)
        return self.head(hidden)


@pytest.mark.parametrize("names", [["embed", "head"], ["head", "embed"]], ids="-".join)
def test_an_embedding_and_the_head_tied_to_it_are_one_layer(names: list[str]) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[1, 2, 2, 0], [0, 0, 7, 3], [9, 1, 1, 1]])
    expected = torch.stack([
        torch.autograd.grad(loss(model, each).sum(), model.embed.weight)[0] for each in ids.split(1)
    ])
    (signals,) = per_example_signals(model.requires_grad_(False), [ids], loss, [names[0], "h", names[1]])
    assert list(signals) == [names[0], "h"]
    found = from_signals(signals[names[0]])
    torch.testing.assert_close(found.mT if names[0] == "embed" else found, expected)


def test_of_tied_layers_one_alone_is_itself() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[1, 2, 2, 0], [0, 0, 7, 3]])
    apart = Tied()
    apart.load_state_dict(model.state_dict())
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    (both,) = per_example_signals(apart, [ids], loss, ["embed", "head"])
    for name in ("embed", "head"):
        (alone,) = per_example_signals(model, [ids], loss, [name])
        assert torch.equal(from_signals(alone[name]), from_signals(both[name]))


def test_ids_of_an_embedding_are_masked_like_any_text() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[1, 2, 2], [5, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    (signals,) = per_example_signals(model, [ids], loss, ["embed"], mask=lambda _: mask)
    assert signals["embed"].real is not None
    assert torch.equal(signals["embed"].real, mask.bool())
    assert not signals["embed"].g[1, 1:].any()


def test_a_convolution_without_example_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input must have shape \(N, channels, …\), got \(4, 6, 6\)"):
        list(per_example_signals(nn.Conv2d(4, 2, 1), [torch.randn(4, 6, 6)], lambda m, x: m(x).sum((1, 2)), [""]))


def test_a_sketch_made_for_another_shape_refuses_an_embedding_s_signals() -> None:
    (signals,) = per_example_signals(Tied(), [torch.tensor([[1, 2]])], loss, ["embed"])
    with pytest.raises(ValueError, match=r"x and g must have shapes \(N, T, 12\) and \(N, T, 5\)"):
        GradientSketch.init((5, 12)).update(signals["embed"])


def test_gradient_spectra_of_layers_that_share_a_shape_share_their_probes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    seen = measure(model, [torch.randn(3, 4).double()], loss, ["0", "1"], {"g": GradientSpectra.init(size=2)})["g"]
    assert seen.sketches["0"].probes is seen.sketches["1"].probes
    assert gradient_spectra(model, [torch.randn(3, 4).double()], loss, ["0", "1"], size=2).keys() == {"0", "1"}
