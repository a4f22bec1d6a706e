"""Estimators of a module's worth, ablations of a trained probe, and what the one says of the other."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from flowra_adapters import adapters
from flowra_allocation import BottleneckObserver, FlowSpectrum, flow_spectrum, truncate
from flowra_analysis import FlowProfile, ModuleProfile, fisher_trace, kfac_gradient_spectra
from flowra_pipelines.estimators import KINDS, estimate, profiled, psi
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.setting import Layers, Setting, base_model, load_setting, lora_layers, survey
from flowra_pipelines.tasks import Batch
from flowra_pipelines.validation import spearman, spearman_interval, validation, write_validation
from flowra_pipelines.validation_runs import (
    LossChange,
    alone,
    held_out_batches,
    held_out_losses,
    leave_one_rank_out,
    loss_change,
    retrain_without,
    run_ablations,
    sample_modules,
    train_probe,
)
from flowra_testing.tiny_runs import tiny_config, tiny_language_config, tiny_regression_config

SCHEMA = Path(__file__).parents[2] / "docs" / "formats" / "validation.schema.json"
NAME = "bert.encoder.layer.1.output.dense"


@dataclass(frozen=True)
class Probe:
    config: RunConfig
    setting: Setting
    layers: Layers
    model: PreTrainedModel
    batches: list[Batch]
    held_out: list[Batch]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in lora_layers(self.model).items()}

    def losses(self) -> Tensor:
        return held_out_losses(self.model, self.setting, self.held_out)


def trained(config: RunConfig) -> Probe:
    torch.set_num_threads(1)
    setting = load_setting(config)
    model = base_model(config, setting)
    layers = survey(config, model, setting.task)
    train_probe(config, setting, model, dict.fromkeys(layers.costs, 3), kept=layers.costs, description="probe")
    model.eval()
    rows = [setting.train[index] for index in range(32)]
    batches = [setting.collate(rows[start : start + 8]) for start in range(0, 32, 8)]
    return Probe(config, setting, layers, model, batches, held_out_batches(config, setting, examples=24))


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """A trained probe of rank 3; its model is left as it is."""
    return trained(load_config(tiny_config(tmp_path_factory.mktemp("validation"))))


def flow_spectra(probe: Probe) -> dict[str, FlowSpectrum]:
    grams = estimate(probe.model, probe.setting, probe.layers, probe.batches, ["probe"]).gains["probe"].grams
    assert grams is not None
    return {name: flow_spectrum(sum(each[1:], each[0])) for name, each in grams.items()}


def per_example_loss(probe: Probe) -> Callable[[torch.nn.Module, Batch], Tensor]:
    return lambda model, batch: probe.setting.task.losses(model, batch)[0]


# estimators


def test_the_probe_s_grams_are_those_that_an_observer_sees(probe: Probe) -> None:
    ours = estimate(probe.model, probe.setting, probe.layers, probe.batches, ["probe"]).gains["probe"]
    with BottleneckObserver(probe.model, lora_layers(probe.model), loss="sum") as observer:
        for batch in probe.batches:
            probe.setting.task.losses(probe.model, batch)[0].sum().backward()
    probe.model.zero_grad(set_to_none=True)
    assert ours.grams is not None
    for name, seen in observer.grams.items():
        for mine, theirs in zip(ours.grams[name], seen, strict=True):
            torch.testing.assert_close(mine.activations, theirs.activations, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(mine.gradients, theirs.gradients, rtol=1e-3, atol=1e-16)
            assert (mine.tokens, mine.examples) == (theirs.tokens, theirs.examples)
        assert ours.gain[name] == pytest.approx(float(flow_spectrum(sum(seen[1:], seen[0])).gains[0]), rel=1e-4)


def test_each_estimator_says_what_its_package_says(probe: Probe) -> None:
    found = estimate(probe.model, probe.setting, probe.layers, probe.batches).gains
    assert tuple(found) == KINDS
    names, loss = list(probe.layers.costs), per_example_loss(probe)
    traces = fisher_trace(probe.model, probe.batches, loss, names, mask=lambda batch: batch["attention_mask"])
    whitened = kfac_gradient_spectra(
        probe.model, probe.batches, loss, names, mask=lambda batch: batch["attention_mask"]
    )
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in probe.layers.shapes.items()}
    exact = copy.deepcopy(probe.model)
    for name in names:
        exact.get_submodule(name).weight.requires_grad_(True)
    for batch in probe.batches:
        probe.setting.task.losses(exact, batch)[0].sum().backward()
    for name in names:
        gradient = exact.get_submodule(name).weight.grad
        assert gradient is not None
        sums[name] = gradient.double() / 32
        delta = adapters(probe.model)[name].delta_weight().detach().double()
        assert found["fisher"].gain[name] == pytest.approx(traces[name].mean, rel=1e-6)
        assert found["kfac_gradient"].gain[name] == pytest.approx(float(whitened[name].gains[0]), rel=1e-6)
        expected = float(torch.linalg.matrix_norm(sums[name], 2)) ** 2 / 2
        assert found["gradient"].gain[name] == pytest.approx(expected, rel=0.02)
        assert found["magnitude"].gain[name] == pytest.approx(float(delta.norm()), rel=1e-5)
        spectra = found["magnitude"].spectra
        assert spectra is not None
        torch.testing.assert_close(spectra[name], torch.linalg.svdvals(delta)[:3], rtol=1e-4, atol=1e-8)


def test_snr_counts_singular_values_above_the_edge_of_noise(probe: Probe) -> None:
    model = copy.deepcopy(probe.model)
    module = model.get_submodule(NAME)
    m, n = probe.layers.shapes[NAME]
    sigma = torch.ones(min(m, n))
    sigma[: len(sigma) // 2] = 2.0  # quartiles 1 and 2: the edge is (1 + √(m/n)) / 1.349
    sigma[0] = 8.0
    u, v = torch.linalg.qr(torch.randn(m, m)).Q, torch.linalg.qr(torch.randn(n, n)).Q
    module.weight.data = u[:, : len(sigma)] * sigma @ v[: len(sigma)]
    edge = (1 + math.sqrt(min(m, n) / max(m, n))) / 1.349
    above = sigma > edge
    expected = float(sigma[above].sum() / sigma[~above].sum() / 8)
    found = estimate(model, probe.setting, probe.layers, probe.batches, ["snr"]).gains["snr"]
    assert 0 < int(above.sum()) < len(sigma)
    assert found.gain[NAME] == pytest.approx(expected, rel=1e-4)


def test_standard_errors_are_the_jackknife_s(probe: Probe) -> None:
    gains = estimate(probe.model, probe.setting, probe.layers, probe.batches).gains
    for kind in ("probe", "fisher", "gradient"):
        rest = [
            estimate(
                probe.model, probe.setting, probe.layers, [*probe.batches[:out], *probe.batches[out + 1 :]], [kind]
            ).gains
            for out in range(4)
        ]
        values = torch.tensor([each[kind].gain[NAME] for each in rest], dtype=torch.float64)
        assert gains[kind].stderr[NAME] == pytest.approx(float((3 * values.var(correction=0)).sqrt()), rel=1e-5)
        assert min(gains[kind].stderr.values()) > 0
    assert gains["magnitude"].stderr == {}


def test_one_batch_tells_no_standard_error(probe: Probe) -> None:
    gains = estimate(probe.model, probe.setting, probe.layers, probe.batches[:1], ["probe"]).gains["probe"]
    known = profiled("probe", gains, probe.layers.costs)
    assert known[NAME].keys() == {"gain_probe", "psi_probe"}


def test_an_error_names_the_batch_of_the_calibration(probe: Probe) -> None:
    model, calls = copy.deepcopy(probe.model), itertools.count()

    def spoil(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        return output * (math.nan if next(calls) == 2 else 1)

    model.get_submodule(NAME).register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"batch 2"):
        estimate(model, probe.setting, probe.layers, probe.batches, ["fisher"])


def test_the_first_order_error_of_the_whitened_gradient_is_near_the_jackknife_s(probe: Probe) -> None:
    ours = estimate(probe.model, probe.setting, probe.layers, probe.batches, ["kfac_gradient"]).gains["kfac_gradient"]
    rest = [
        estimate(
            probe.model,
            probe.setting,
            probe.layers,
            [*probe.batches[:out], *probe.batches[out + 1 :]],
            ["kfac_gradient"],
        ).gains
        for out in range(4)
    ]
    ratios = []
    for name, stderr in ours.stderr.items():
        values = torch.tensor([each["kfac_gradient"].gain[name] for each in rest], dtype=torch.float64)
        ratios.append(stderr / float((3 * values.var(correction=0)).sqrt()))
    assert 0.2 < float(torch.tensor(ratios).median()) < 5


def test_psi_of_an_estimator_has_the_median_module_at_a_half(probe: Probe) -> None:
    gains = estimate(probe.model, probe.setting, probe.layers, probe.batches, ["probe"]).gains["probe"]
    values, errors = psi(gains, probe.layers.costs)
    densities = {name: gain / probe.layers.costs[name] for name, gain in gains.gain.items()}
    assert sorted(values, key=values.__getitem__) == sorted(densities, key=densities.__getitem__)
    below = sum(value < 0.5 for value in values.values())
    assert below == len(values) // 2
    assert max(errors.values()) < 0.5


def test_costs_are_in_passes_over_the_same_examples(probe: Probe) -> None:
    once = estimate(probe.model, probe.setting, probe.layers, probe.batches).gains
    twice = estimate(probe.model, probe.setting, probe.layers, [*probe.batches, *probe.batches]).gains
    for kind in ("probe", "fisher", "gradient"):
        assert 1 < once[kind].cost == pytest.approx(twice[kind].cost)
    assert once["snr"].cost == pytest.approx(2 * twice["snr"].cost)
    assert once["magnitude"].cost < 0.1


def test_a_base_without_adapters_has_a_gradient_and_no_probe(probe: Probe) -> None:
    bare = base_model(probe.config, probe.setting)
    found = estimate(bare, probe.setting, probe.layers, probe.batches, ["gradient"]).gains
    assert found["gradient"].gain.keys() == probe.layers.costs.keys()
    with pytest.raises(ValueError, match="adapter must be attached"):
        estimate(bare, probe.setting, probe.layers, probe.batches, ["probe"])


def test_what_cannot_be_estimated_is_refused(probe: Probe) -> None:
    with pytest.raises(ValueError, match=r"kinds must be among .*, got \['hessian'\]"):
        estimate(probe.model, probe.setting, probe.layers, probe.batches, ["hessian"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        estimate(probe.model, probe.setting, probe.layers, [], ["probe"])


def test_estimating_leaves_the_model_as_it_was(probe: Probe) -> None:
    before = {name: tensor.clone() for name, tensor in probe.model.state_dict().items()}
    modes = [module.training for module in probe.model.modules()]
    estimate(probe.model, probe.setting, probe.layers, probe.batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.model.state_dict().items())
    assert modes == [module.training for module in probe.model.modules()]
    assert all(parameter.grad is None for parameter in probe.model.parameters())


# ablations


@pytest.mark.parametrize(("removed", "kept"), [("first", None), ("last", 2), ("module", 0)])
def test_leaving_rank_out_is_what_a_model_without_it_loses(probe: Probe, removed: str, kept: int | None) -> None:
    spectra = flow_spectra(probe)
    found = leave_one_rank_out(probe.model, {NAME: spectra[NAME]}, probe.losses, removed=removed)[NAME]  # type: ignore[arg-type]
    other = copy.deepcopy(probe.model)
    layer, spectrum = lora_layers(other)[NAME], spectra[NAME]
    if kept is None:  # all but the first: what is left of B' A' without its first column and row
        b, a = layer.lora_B.double() @ spectrum.to_B, spectrum.to_A @ layer.lora_A.double()
        layer.replace_factors(a[1:].float(), b[:, 1:].float())
    else:
        layer.replace_factors(*truncate(layer.lora_A, layer.lora_B, spectrum, kept))
    without, full = held_out_losses(other, probe.setting, probe.held_out), probe.losses()
    expected = loss_change(without, full, parameters=1)
    assert found.loss_change == pytest.approx(expected.loss_change, rel=1e-3, abs=1e-8)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-2, abs=1e-8)
    assert found.parameters == probe.layers.costs[NAME] * (3 if removed == "module" else 1)
    assert found.loss_change != 0


def test_units_of_rank_leave_in_the_order_of_their_gains(probe: Probe) -> None:
    layer, spectrum = lora_layers(probe.model)[NAME], flow_spectra(probe)[NAME]
    changed: list[float] = []

    def losses() -> Tensor:
        changed.append(float((layer.lora_B @ layer.lora_A).detach().norm()))
        return torch.zeros(2)

    for removed in ("first", "last", "module"):
        leave_one_rank_out(probe.model, {NAME: spectrum}, losses, removed=removed)
    full, first, _, last, _, none = changed
    assert none == 0
    assert abs(full - last) < abs(full - first)


def test_the_model_is_bitwise_the_same_afterwards_and_after_an_error(probe: Probe) -> None:
    before = {name: tensor.clone() for name, tensor in probe.model.state_dict().items()}
    spectra, calls = flow_spectra(probe), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of memory")
        return torch.zeros(4)

    leave_one_rank_out(probe.model, spectra, probe.losses, removed="first")
    with pytest.raises(RuntimeError, match="out of memory"):
        leave_one_rank_out(probe.model, spectra, failing, removed="module")
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.model.state_dict().items())


def test_a_spectrum_of_another_rank_is_refused(probe: Probe) -> None:
    spectrum = FlowSpectrum(torch.ones(2), torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"spectra must have one gain for each unit, got 2 for 3 at 'bert\.encoder"):
        leave_one_rank_out(probe.model, {NAME: spectrum}, probe.losses)


def test_training_with_all_modules_again_is_the_probe_itself(probe: Probe) -> None:
    again = retrain_without(probe.config, probe.setting, "none of them", probe.ranks, probe.held_out)
    assert torch.equal(again, probe.losses())


def test_a_module_left_out_or_alone_changes_only_who_may_learn(probe: Probe) -> None:
    full, bare = probe.losses(), alone(probe.config, probe.setting, None, probe.ranks, probe.held_out)
    only = alone(probe.config, probe.setting, NAME, probe.ranks, probe.held_out)
    without = retrain_without(probe.config, probe.setting, NAME, probe.ranks, probe.held_out)
    assert len({tuple(each.tolist()) for each in (full, bare, only, without)}) == 4
    everyone = alone(probe.config, probe.setting, NAME, {NAME: 3}, probe.held_out)
    assert everyone.mean() != only.mean()  # drawn alone, the adapter would start elsewhere


def test_a_language_model_without_rank_is_its_base(tmp_path: Path) -> None:
    config = load_config(tiny_language_config(tmp_path))
    setting = load_setting(config)
    base = base_model(config, setting)
    ranks = dict.fromkeys(survey(config, base, setting.task).costs, 2)
    batches = held_out_batches(config, setting, examples=6)
    assert torch.equal(alone(config, setting, None, ranks, batches), held_out_losses(base, setting, batches))


def test_loss_changes_have_paired_standard_errors() -> None:
    without, full = torch.tensor([1.0, 2.0, 4.0, 7.0]), torch.tensor([0.5, 2.0, 3.0, 8.0])
    change = loss_change(without, full, parameters=5)
    assert change.loss_change == pytest.approx(0.125)
    assert change.stderr == pytest.approx(float(stats.sem([0.5, 0.0, 1.0, -1.0])))
    assert change.halves == (0.75, -0.5)


def test_a_sample_has_one_module_of_each_part_of_the_range() -> None:
    sensitivity = {f"m{index:02}": index / 40 for index in range(40)}
    chosen = sample_modules(sensitivity, 8, seed=3)
    assert [int(name[1:]) // 5 for name in chosen] == list(range(8))
    assert chosen == sample_modules(sensitivity, 8, seed=3)
    assert len({tuple(sample_modules(sensitivity, 8, seed=seed)) for seed in range(5)}) == 5
    assert sample_modules(sensitivity, 99, seed=0) == sorted(sensitivity)
    assert sample_modules(sensitivity, 0, seed=0) == []


# what the one says of the other


def made_profile(gains: Mapping[str, Mapping[str, float]]) -> FlowProfile:
    names = list(next(iter(gains.values())))
    return FlowProfile(
        modules={
            name: ModuleProfile(
                shape=(4, 2 + index),
                cost_per_rank=6 + index,
                statistics={f"gain_{kind}": each[name] for kind, each in gains.items()}
                | {f"gain_{kind}_stderr": 0.5 for kind in gains}
                | {f"psi_{kind}_stderr": 0.01 * index for kind in gains},
            )
            for index, name in enumerate(names)
        },
        base_parameters=100,
        provenance={"seed": 7},
    )


def changes(values: Mapping[str, float], parameters: int = 1) -> dict[str, LossChange]:
    return {
        name: LossChange(loss_change=value, stderr=0.1, parameters=parameters, halves=(value, value))
        for name, value in values.items()
    }


NAMES = [f"layer.{index}" for index in range(12)]
RISING = dict(zip(NAMES, [float(2**index) for index in range(12)], strict=True))
FALLING = {name: -value for name, value in RISING.items()}


def test_an_estimator_that_orders_modules_as_the_loss_does_has_correlation_one() -> None:
    profile = made_profile({"good": RISING, "bad": {name: 4096 + value for name, value in FALLING.items()}})
    content = validation(profile, {"leave_one_rank_out": changes(RISING), "alone": changes(FALLING)})
    good, bad = content["estimators"]["good"], content["estimators"]["bad"]
    assert good["spearman"]["leave_one_rank_out"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (good["spearman"]["alone"]["value"], bad["spearman"]["alone"]["value"]) == (-1.0, 1.0)
    assert content["agreement"] == {"good": {"bad": -1.0}, "bad": {"good": -1.0}}
    assert good["psi_stderr_median"] == pytest.approx(0.055)
    assert content["reliability"] == {"leave_one_rank_out": 1.0, "alone": 1.0}
    assert content["provenance"]["profile_seed"] == 7


def test_densities_are_compared_with_loss_changes_per_parameter() -> None:
    gains = {name: 10.0 * (6 + index) * (12 - index) for index, name in enumerate(NAMES)}  # density falls, gain rises
    profile = made_profile({"probe": gains})
    lost = {
        name: LossChange(loss_change=(12 - index) * 3.0 * 2**index, stderr=0, parameters=2**index, halves=(0, 0))
        for index, name in enumerate(NAMES)
    }
    entry = validation(profile, {"leave_one_rank_out": lost})["estimators"]["probe"]
    assert entry["spearman_per_parameter"]["leave_one_rank_out"]["value"] == 1.0
    assert entry["spearman"]["leave_one_rank_out"]["value"] < 1


def test_spearman_with_ties_is_scipy_s() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        a, b = (torch.randint(0, 5, (15,), generator=generator).tolist() for _ in range(2))
        first, second = (dict(zip(range(15), each, strict=True)) for each in (a, b))
        assert spearman(first, second) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)  # type: ignore[arg-type]
    assert spearman({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}) is None
    assert spearman({"a": 1.0}, {"a": 1.0}) is None
    assert spearman({"a": 1.0, "b": 2.0, "x": 0.0}, {"a": 1.0, "b": 2.0, "y": 9.0}) == 1.0


def test_the_bootstrap_covers_the_value_and_narrows_with_modules() -> None:
    def interval(count: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, generator=generator)
        y = x + torch.randn(count, generator=generator)
        first, second = ({str(i): float(v) for i, v in enumerate(each)} for each in (x, y))
        found = spearman_interval(first, second, seed=0, resamples=500)
        assert found is not None
        assert found == spearman_interval(first, second, seed=0, resamples=500)
        return found

    few, many = interval(20), interval(320)
    for each in (few, many):
        assert each["low"] < each["value"] < each["high"]
    assert 3 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 5.5  # about √16


def test_noise_in_the_loss_changes_shows_in_their_reliability() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 12, generator=generator).tolist()
    lost = {
        name: LossChange(loss_change=0, stderr=1, parameters=1, halves=(noise[0][index], noise[1][index]))
        for index, name in enumerate(NAMES)
    }
    content = validation(made_profile({"probe": RISING}), {"alone": lost})
    half = stats.spearmanr(*noise).statistic
    assert content["reliability"]["alone"] == pytest.approx(max(0.0, 2 * half / (1 + half)))
    assert content["estimators"]["probe"]["spearman"]["alone"] is None


def test_a_profile_without_estimators_and_ablations_of_other_modules_are_refused() -> None:
    profile = FlowProfile(modules={"a": ModuleProfile(shape=(2, 2), cost_per_rank=4)}, base_parameters=9)
    with pytest.raises(ValueError, match="profile must hold a statistic gain_<estimator>, got none"):
        validation(profile, {})
    with pytest.raises(ValueError, match=r"ablations must be of modules of the profile, got \['other'\]"):
        validation(made_profile({"probe": RISING}), {"alone": changes({"other": 1.0})})


def test_equal_values_give_equal_bytes_and_follow_the_schema(tmp_path: Path) -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    profile = made_profile({"probe": RISING, "flat": dict.fromkeys(NAMES, 1.0)})
    lost = {"leave_one_rank_out": changes(RISING), "alone": changes({NAMES[0]: 1.0})}
    first, second = (
        write_validation(
            validation(profile, dict(sorted(lost.items(), reverse=turned)), stability={"probe": {"disjoint_32": 0.9}}),
            tmp_path / str(turned),
        )
        for turned in (False, True)
    )
    assert first.read_bytes() == second.read_bytes()
    content = json.loads(first.read_text(encoding="utf-8"))
    validator.validate(content)
    assert content["estimators"]["flat"]["spearman"] == {"leave_one_rank_out": None, "alone": None}
    assert [path.name for path in first.parent.iterdir()] == ["validation.json"]


@pytest.mark.parametrize(
    "made",
    [
        tiny_config,
        pytest.param(tiny_regression_config, marks=pytest.mark.slow),
        pytest.param(tiny_language_config, marks=pytest.mark.slow),
    ],
)
def test_a_whole_validation_follows_the_schema(made: Callable[[Path], dict[str, object]], tmp_path: Path) -> None:
    probe = trained(load_config(made(tmp_path)))
    gains = estimate(probe.model, probe.setting, probe.layers, probe.batches).gains
    statistics = {
        name: {f"gain_{kind}": each.gain[name] for kind, each in gains.items()} for name in probe.layers.costs
    }
    profile = FlowProfile(
        modules={
            name: ModuleProfile(
                shape=probe.layers.shapes[name], cost_per_rank=probe.layers.costs[name], statistics=statistics[name]
            )
            for name in statistics
        },
        base_parameters=probe.layers.base_parameters,
    )
    sensitivity, _ = psi(gains["probe"], probe.layers.costs)
    ablations = run_ablations(
        probe.config, probe.setting, probe.model, flow_spectra(probe), sensitivity, examples=16, retrained=2
    )
    content = validation(profile, ablations, costs={kind: each.cost for kind, each in gains.items()}, resamples=50)
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(content)
    assert list(ablations) == [
        "leave_one_rank_out",
        "leave_last_rank_out",
        "leave_module_out",
        "retrain_without",
        "alone",
    ]
    assert [len(each) for each in ablations.values()] == [len(statistics)] * 3 + [2, 2]
    assert content["estimators"].keys() == set(KINDS)
