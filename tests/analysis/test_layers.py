import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from flowra_analysis import (
    effective_rank,
    fisher_trace,
    is_measurable_layer,
    layer_signals,
    profile_weights,
    redundancy,
    weight_matrix,
)

Batch = dict[str, Tensor]
NAMES = [
    f"transformer.h.{block}.{name}"
    for block in (0, 1)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double().eval()


def batches() -> list[Batch]:
    """Token sequences padded on the right; N = 3 and 2."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for lengths in ([5, 3, 4], [6, 2]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        made.append({"tokens": torch.randint(23, mask.shape, generator=generator), "mask": mask})
    return made


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits
    each = F.cross_entropy(logits[:, :-1].mT, batch["tokens"][:, 1:], reduction="none")
    return (each * batch["mask"][:, 1:]).sum(1)


class Derived(Conv1D):
    """A class of ours, derived from that of transformers."""


class Stranger(nn.Module):
    """What another library may call by the same name."""


Stranger.__name__ = "Conv1D"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2), True),
        (Conv1D(2, 3), True),
        (Derived(2, 3), True),
        (Stranger(), False),
        (nn.Conv1d(3, 2, 1), True),
        (nn.ConvTranspose2d(3, 2, 1), True),
        (nn.Embedding(3, 2), True),
        (nn.LayerNorm(3), False),
        (nn.Bilinear(3, 3, 2), False),
    ],
    ids=lambda value: type(value).__qualname__ if isinstance(value, nn.Module) else "",
)
def test_what_is_measured_is_linear_layers_convolutions_and_embeddings(module: nn.Module, expected: bool) -> None:
    assert is_measurable_layer(module) is expected


@pytest.mark.parametrize("module", [nn.Linear(3, 2), Conv1D(2, 3)], ids=["Linear", "Conv1D"])
def test_the_weight_matrix_is_out_by_in_and_shares_the_memory_of_the_weight(module: nn.Module) -> None:
    weight, x = weight_matrix(module), torch.randn(4, 3)
    assert weight.shape == (2, 3)
    assert weight.data_ptr() == module.weight.data_ptr()
    torch.testing.assert_close(x @ weight.T + module.bias, module(x))


def test_the_weight_matrix_of_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"module must be one of nn\.Linear, .* and nn\.Embedding, got LayerNorm"):
        weight_matrix(nn.LayerNorm(3))


def test_a_wrong_name_is_told_the_nearest_conv1d() -> None:
    with pytest.raises(
        ValueError, match=r"no module 'transformer\.h\.0\.attn\.c_atn', nearest names: transformer\.h\.0"
    ):
        profile_weights(gpt2(), ["transformer.h.0.attn.c_atn"])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_signals_of_a_conv1d_sum_to_the_transposed_weight_gradient(frozen: bool) -> None:
    model, found = gpt2(), {}
    expected = torch.autograd.grad(
        loss(model, batches()[0]).sum(), [model.get_submodule(name).weight for name in NAMES]
    )
    model.requires_grad_(not frozen)
    with layer_signals(
        model, NAMES, lambda name, seen: found.update({name: torch.einsum("ntm,ntk->mk", seen.g, seen.x)})
    ):
        loss(model, batches()[0]).sum().backward()
    for name, gradient in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(found[name], gradient.T)


def test_a_conv1d_called_by_keyword_is_seen() -> None:
    layer, found = Conv1D(2, 3), []
    with layer_signals(layer, [""], lambda _, seen: found.append((seen.x.shape, seen.g.shape))):
        layer(x=torch.ones(4, 5, 3)).sum().backward()
    assert found == [((4, 5, 3), (4, 5, 2))]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_the_fisher_trace_of_a_real_gpt2_is_that_of_per_example_autograd(frozen: bool) -> None:
    model = gpt2()
    norms: dict[str, list[float]] = {name: [] for name in NAMES}
    for batch in batches():
        for tokens, mask in zip(*batch.values(), strict=True):
            alone = {"tokens": tokens[mask == 1][None], "mask": mask[mask == 1][None]}
            weights = [model.get_submodule(name).weight for name in NAMES]
            for name, each in zip(NAMES, torch.autograd.grad(loss(model, alone).sum(), weights), strict=True):
                norms[name].append(float(each.square().sum()))
    found = fisher_trace(model.requires_grad_(not frozen), batches(), loss, NAMES, mask=lambda batch: batch["mask"])
    for name, each in norms.items():
        assert found[name].mean == pytest.approx(sum(each) / 5, rel=1e-9)
        assert found[name].standard_error == pytest.approx(float(torch.tensor(each).std()) / 5**0.5, rel=1e-5)


def test_weights_of_a_real_gpt2_are_profiled_like_those_of_the_linear_layer_that_does_the_same() -> None:
    model = gpt2()
    statistics, spectra = profile_weights(model, NAMES)
    for name in NAMES:
        sigma = torch.linalg.svdvals(model.get_submodule(name).weight)
        torch.testing.assert_close(spectra[name], sigma.detach())
        assert statistics[name]["weight_effective_rank"] == pytest.approx(effective_rank(sigma))
        shape = tuple(weight_matrix(model.get_submodule(name)).shape)
        assert statistics[name]["weight_redundancy"] == pytest.approx(redundancy(sigma, shape))
    assert weight_matrix(model.get_submodule("transformer.h.0.attn.c_attn")).shape == (24, 8)


def quantised(kind: str) -> tuple[nn.Module, Tensor]:
    """Build a layer as a library stores it, and the weight that it stands for."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    if kind == "torchao int8":
        model = nn.Sequential(plain)
        torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig(version=2))
        return model[0], model[0].weight.dequantize()
    layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    layer(torch.zeros(1, 64))  # it quantises where it first computes
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_the_weight_matrix_of_a_quantised_layer_is_the_weight_it_computes_with(kind: str) -> None:
    layer, expected = quantised(kind)
    torch.testing.assert_close(weight_matrix(layer), expected.float(), rtol=1e-5, atol=1e-6)
    statistics, spectra = profile_weights(nn.Sequential(layer), ["0"])
    torch.testing.assert_close(spectra["0"].float(), torch.linalg.svdvals(expected.float()), rtol=1e-4, atol=1e-5)
    assert statistics["0"]["weight_effective_rank"] > 1


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_the_fisher_trace_on_a_frozen_quantised_layer_is_that_of_the_weight_it_stands_for(kind: str) -> None:
    layer, weight = quantised(kind)
    twin = nn.Linear(64, 96)
    twin.weight.data, twin.bias.data = weight.float(), layer.bias.data.float()
    batch = [torch.randn(4, 5, 64)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum((1, 2))

    found, expected = (fisher_trace(nn.Sequential(each), batch, loss, ["0"])["0"] for each in (layer, twin))
    assert found.mean == pytest.approx(expected.mean, rel=1e-3)


def test_what_hangs_on_a_quantised_layer_is_none_of_its_weight() -> None:
    layer, expected = quantised("nf4")
    layer.register_forward_hook(lambda module, args, output: output + 3 * args[0].sum(-1, keepdim=True))
    torch.testing.assert_close(weight_matrix(layer), expected.float(), rtol=1e-5, atol=1e-6)
