"""What a unit of rank is worth in each module, by one estimator or another: the one place where gains come from.

Four look at examples, in one pass together, with the model as it is given, usually a trained probe:

- ``probe``: the flow gains ½ s² λ of the learned update, from its bottleneck Grams (docs/methods.md, section 4).
- ``fisher``: the trace of the empirical Fisher (section 2).
- ``gradient``: ½ σ₁² of the mean gradient G, from a sketch (section 10).
- ``kfac_gradient``: ½ σ₁² of S^-½ G C^-½ with damped K-FAC factors (section 11), what the best single unit would gain
  in the K-FAC model of the loss.

Two are baselines and look at none:

- ``magnitude``: ‖ΔW‖_F of the learned update.
- ``snr``: of the base weight, the singular values above the edge of noise over those below, divided by the largest
  (Spectrum: Hartford et al. 2024, arXiv:2406.06623).

Units differ, so what two estimators say compares by its order only.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from flowra_adapters import LoRA, disabled
from flowra_allocation import BottleneckGram, flow_spectrum, sensitivity
from flowra_analysis import (
    KFAC,
    EmpiricalFisher,
    GradientSpectra,
    MeanGradients,
    Signals,
    Statistic,
    kfac_gradient_spectrum,
    measure,
    profile_weights,
)
from flowra_pipelines.stages.setting import Layers, Setting, lora_layers
from flowra_pipelines.tasks import Batch

__all__ = ["KINDS", "LOOK_AT_EXAMPLES", "Estimates", "Gains", "Kind", "estimate", "profiled", "psi"]

Kind = Literal["probe", "fisher", "gradient", "kfac_gradient", "magnitude", "snr"]
KINDS: tuple[Kind, ...] = ("probe", "fisher", "gradient", "kfac_gradient", "magnitude", "snr")
LOOK_AT_EXAMPLES: tuple[Kind, ...] = ("probe", "fisher", "gradient", "kfac_gradient")
SKETCH_SIZE = 16
"""Singular values in a sketch of the gradient; a quarter of them is good, and one is used."""

NOTHING: Mapping[str, Statistic] = MappingProxyType({})

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gains:
    """What one estimator says of each module."""

    gain: Values
    """Module name to what its first unit of rank is worth, ≥ 0."""
    stderr: Values
    """Module name to the jackknife's standard error over batches; empty with one batch, or where no example counts."""
    spectra: dict[str, Tensor] | None
    """Module name to the values of all units, ``(r,)``, non-increasing, float64; None for an estimator without."""
    cost: float
    """Of this estimator alone, in plain forward and backward passes over the same examples, by their multiplications:
    2 m n for each token and module, the base being frozen."""
    replicates: tuple[Values, ...] = field(default=(), repr=False)
    """The gains with the first batch left out, with the second left out, …; none where there is one batch."""
    grams: dict[str, list[BottleneckGram]] | None = field(default=None, repr=False)
    """Only of ``probe``: module name to the bottleneck Grams, batch by batch."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """What estimators say, and what they have seen."""

    gains: dict[Kind, Gains]
    """By estimator."""
    states: dict[str, Any]
    """Those of ``probe``, ``fisher`` and ``gradient`` after all batches, as far as they were needed, ``factors`` and
    ``mean`` of ``kfac_gradient``, and what else was fed."""


@dataclass(frozen=True, slots=True)
class Found:
    """Values before they have a cost and a standard error."""

    gain: Values
    spectra: dict[str, Tensor] | None = None
    replicates: tuple[Values, ...] = ()
    grams: dict[str, list[BottleneckGram]] | None = None


def estimate(
    model: nn.Module,
    setting: Setting,
    layers: Layers,
    batches: Sequence[Batch],
    kinds: Sequence[Kind] = KINDS,
    *,
    labels: Literal["data", "model"] = "data",
    seed: int = 0,
    also: Mapping[str, Statistic] = NOTHING,
) -> Estimates:
    """Ask estimators what the first unit of rank is worth in each module.

    Args:
        model: with LoRA adapters on the modules, whose updates are measured. A base without any will do for all but
            ``probe`` and ``magnitude``. Left as it is.
        setting: of the run.
        layers: the modules.
        batches: examples, in the task's layout; two batches or more for standard errors.
        kinds: which estimators.
        labels: those of the data, or drawn from the model by ``seed``.
        seed: of the draws.
        also: more statistics to feed from the same pass, by names that are not those of estimators.

    Returns:
        Estimator to gains, in the order of ``kinds``; and the states behind them.

    Raises:
        ValueError: if a kind is unknown, there is no batch, a module has no adapter or is not reached by the loss, or
            a statistic is not finite.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be among {list(KINDS)}, got {unknown or 'none'}")
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    lora = _adapters(model, layers, kinds)
    generator = torch.Generator().manual_seed(seed) if labels == "model" else None
    losses = _losses(model, setting, generator)
    looking = [kind for kind in kinds if kind in LOOK_AT_EXAMPLES]
    found, states = _measured(model, losses, layers, batches, looking, lora, also)
    if "magnitude" in kinds:
        found["magnitude"] = _magnitudes(lora)
    if "snr" in kinds:
        found["snr"] = _signal_to_noise(model, layers)
    gains = {
        kind: Gains(
            gain=found[kind].gain,
            stderr=_jackknife(found[kind]),
            spectra=found[kind].spectra,
            cost=_cost(kind, layers, batches, {name: one.rank for name, one in lora.items()}),
            replicates=found[kind].replicates,
            grams=found[kind].grams,
        )
        for kind in kinds
    }
    return Estimates(gains, states)


def psi(gains: Gains, costs: Mapping[str, int]) -> tuple[Values, Values]:
    """Turn gains into sensitivities ψ over the first unit of rank (docs/methods.md, section 5).

    Args:
        gains: of one estimator.
        costs: module name to parameters per unit of rank.

    Returns:
        ψ, and its standard error as in :class:`Gains`, by module name.
    """

    def of(gain: Values) -> Values:
        return sensitivity({name: [value] for name, value in gain.items()}, costs)

    found = Found(of(gains.gain), replicates=tuple(map(of, gains.replicates)))
    return found.gain, _jackknife(found)


def profiled(kind: str, gains: Gains, costs: Mapping[str, int]) -> dict[str, Values]:
    """Return what a profile holds of an estimator: gains and ψ, with standard errors where they are known.

    Args:
        kind: of the estimator.
        gains: what it says.
        costs: module name to parameters per unit of rank.

    Returns:
        Module name to statistics.
    """
    values, errors = psi(gains, costs)
    columns = {
        f"gain_{kind}": gains.gain,
        f"gain_{kind}_stderr": gains.stderr,
        f"psi_{kind}": values,
        f"psi_{kind}_stderr": errors,
    }
    return {name: {key: each[name] for key, each in columns.items() if name in each} for name in costs}


def _adapters(model: nn.Module, layers: Layers, kinds: Sequence[Kind]) -> dict[str, LoRA]:
    """Return the modules' adapters where an estimator needs them."""
    if not {"probe", "magnitude"} & set(kinds):
        return {}
    lora = lora_layers(model)
    bare = [name for name in layers.shapes if name not in lora or not lora[name].rank]
    if bare:
        raise ValueError(f"modules must carry a LoRA adapter of rank ≥ 1, got none on {bare}")
    return {name: lora[name] for name in layers.shapes}


# What the batches say


@dataclass(frozen=True, slots=True)
class ProbeGrams:
    """Bottleneck Grams from what passes through the adapted layers: z = A x, and ∂ℓ/∂z = s Bᵀ g."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module name to A ``(r, n)`` and s · B ``(m, r)``."""
    grams: Mapping[str, BottleneckGram] = field(default_factory=dict)

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> Self:
        """Add the examples of one batch for one module."""
        lora_A, scaled_B = self.factors[name]
        z, delta = signals.x.to(lora_A.dtype) @ lora_A.T, signals.g.to(scaled_B.dtype) @ scaled_B
        real = torch.ones(z.shape[:2], dtype=torch.bool) if signals.real is None else signals.real
        return self._plus({name: BottleneckGram.of(z[real], delta[real], examples=len(z))})

    def merge(self, other: Self) -> Self:
        """Return the state that has seen the examples of both."""
        return self._plus(other.grams)

    def _plus(self, more: Mapping[str, BottleneckGram]) -> Self:
        sums = {name: self.grams[name] + gram if name in self.grams else gram for name, gram in more.items()}
        return type(self)(self.factors, {**self.grams, **sums})


def _probe_spectra(state: ProbeGrams) -> dict[str, Tensor]:
    return {name: flow_spectrum(gram).gains for name, gram in state.grams.items()}


def _fisher_spectra(state: EmpiricalFisher) -> dict[str, Tensor]:
    return {name: torch.tensor([each.mean], dtype=torch.float64) for name, each in state.finalise().items()}


def _gradient_spectra(state: GradientSpectra) -> dict[str, Tensor]:
    return {name: each.singular_values.cpu().square() / 2 for name, each in state.finalise().items()}


_SPECTRA: Mapping[str, Callable[[Any], dict[str, Tensor]]] = MappingProxyType({
    "probe": _probe_spectra,
    "fisher": _fisher_spectra,
    "gradient": _gradient_spectra,
})


def _losses(
    model: nn.Module, setting: Setting, generator: torch.Generator | None
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return what computes each example's loss, with labels of the data or drawn from the model."""
    device = next(model.parameters()).device

    def losses(module: nn.Module, batch: Batch) -> Tensor:
        moved = {key: value.to(device) for key, value in batch.items()}
        if generator is None:
            return setting.task.losses(module, moved)[0]
        return setting.task.drawn_losses(module, moved, generator)

    return losses


def _measured(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    layers: Layers,
    batches: Sequence[Batch],
    kinds: Sequence[Kind],
    lora: Mapping[str, LoRA],
    also: Mapping[str, Statistic],
) -> tuple[dict[str, Found], dict[str, Any]]:
    """Feed the statistics of these kinds from one pass, and take each batch out again for the jackknife.

    Returns:
        What was found, and the states that have seen all batches.
    """
    if not kinds and not also:
        return {}, {}
    factors = {name: (one.lora_A.detach(), one.lora_B.detach() * one.scaling) for name, one in lora.items()}
    begun: dict[str, Any] = {
        "probe": ProbeGrams(factors),
        "fisher": EmpiricalFisher.init(),
        "gradient": GradientSpectra.init(size=SKETCH_SIZE),
    }
    wanted = {"gradient" if kind == "kfac_gradient" else kind for kind in kinds}  # its standard error needs sketches
    begun = {kind: state for kind, state in begun.items() if kind in wanted}
    whole: dict[str, Any] = dict(also)
    if "kfac_gradient" in kinds:
        whole |= {"factors": KFAC.init(), "mean": MeanGradients.init()}
    parts: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        seen = measure(
            model,
            [batch],
            losses,
            list(layers.shapes),
            {**begun, **whole},
            mask=lambda each: each["attention_mask"],
            first_batch=index,
        )
        whole = {kind: seen.pop(kind) for kind in whole}
        parts.append(seen)
    found: dict[str, Found] = {}
    for kind in kinds:
        if kind in _SPECTRA:
            found[kind] = _found([part[kind] for part in parts], _SPECTRA[kind])
    if "probe" in found:
        grams = {name: [part["probe"].grams[name] for part in parts] for name in layers.shapes}
        found["probe"] = replace(found["probe"], grams=grams)
    if "kfac_gradient" in kinds:
        sketches = [part["gradient"] for part in parts]
        found["kfac_gradient"] = _found_kfac(whole["factors"], whole["mean"], sketches)
    return found, {**{kind: _merged([part[kind] for part in parts]) for kind in begun}, **whole}


def _found(parts: Sequence[Any], spectra: Callable[[Any], dict[str, Tensor]]) -> Found:
    """Merge the batches: all of them, and all but each one."""
    whole = spectra(_merged(parts))
    replicates = tuple(_first(spectra(each)) for each in _all_but_one(parts))
    return Found(_first(whole), whole if any(len(each) > 1 for each in whole.values()) else None, replicates)


def _all_but_one(parts: Sequence[Any], others: Sequence[Any] = ()) -> Iterator[Any]:
    """Merge all states but the first, all but the second, …; ``others`` are in all of them.

    By halves, so that few sums are alive at once: a state can be as large as the model.

    Yields:
        The merged states, in the order of those left out; nothing where one state is all there is.
    """
    if len(parts) == 1:
        yield from others
        return
    first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    yield from _all_but_one(first, [_merged([*others, *second])])
    yield from _all_but_one(second, [_merged([*others, *first])])


def _found_kfac(factors: KFAC, gradients: MeanGradients, sketches: Sequence[GradientSpectra]) -> Found:
    """Whiten the mean gradient of all batches; without one of them, take it along the leading direction of all.

    To first order in the batch's weight that is what leaving it out of G does; its part in the factors is neglected,
    and its own gradient is what a sketch knows of it.

    Returns:
        Gains, spectra and replicates.
    """
    parts = [each.finalise() for each in sketches] if len(sketches) > 1 else []
    sizes = [next(iter(each.sketches.values())).num_examples for each in sketches]
    means = gradients.finalise()
    spectra: dict[str, Tensor] = {}
    replicates: list[Values] = [{} for _ in parts]
    for name, each in factors.finalise().items():
        spectrum = kfac_gradient_spectrum(means[name], each)
        spectra[name] = spectrum.gains.cpu()
        top, left, right = float(spectrum.singular_values[0]), spectrum.left[:, 0], spectrum.right[:, 0]
        for replicate, part, size in zip(replicates, parts, sizes if parts else [], strict=True):
            own = part[name]
            along = float(((left @ own.left.double()) * own.singular_values * (right @ own.right.double())).sum())
            replicate[name] = ((top * sum(sizes) - along * size) / (sum(sizes) - size)) ** 2 / 2
    return Found(_first(spectra), spectra, tuple(replicates))


def _merged(parts: Sequence[Any]) -> Any:  # noqa: ANN401 - states of one kind
    return reduce(_merge, parts)


def _merge(ours: Any, theirs: Any) -> Any:  # noqa: ANN401 - states of one kind
    return ours.merge(theirs)


def _first(spectra: Mapping[str, Tensor]) -> Values:
    return {name: float(each[0]) for name, each in spectra.items()}


def _jackknife(found: Found) -> Values:
    """Estimate standard errors from the replicates; none of fewer than two, for then they are unknown."""
    count = len(found.replicates)
    if count < 2:
        return {}
    table = {name: torch.tensor([each[name] for each in found.replicates], dtype=torch.float64) for name in found.gain}
    return {name: float(((count - 1) * each.var(correction=0)).sqrt()) for name, each in table.items()}


# What needs no example


def _magnitudes(lora: Mapping[str, LoRA]) -> Found:
    """Take ‖s B A‖_F and the singular values, from those of the r × r core of thin QR factors."""
    spectra = {}
    for name, one in lora.items():
        a, b = one.lora_A.detach().double(), one.lora_B.detach().double()
        core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        spectra[name] = (abs(one.scaling) * torch.linalg.svdvals(core)).cpu()
    return Found({name: float(each.norm()) for name, each in spectra.items()}, spectra)


def _signal_to_noise(model: nn.Module, layers: Layers) -> Found:
    """Compare singular values of the base weights with the edge of noise that their interquartile range suggests.

    The edge is (1 + √(q/p)) · IQR / 1.349 for a matrix (q, p), q ≤ p, as in the method's code.

    Returns:
        The ratios, without spectra.
    """
    with disabled(model) if _has_adapters(model) else nullcontext():
        _, spectra = profile_weights(model, list(layers.shapes))
    gain = {}
    for name, sigma in spectra.items():
        short, long = sorted(layers.shapes[name])
        low, high = (float(torch.quantile(sigma.double(), share)) for share in (0.25, 0.75))
        above = sigma > (1 + math.sqrt(short / long)) * (high - low) / 1.349
        noise, largest = float(sigma[~above].sum()), float(sigma[0])
        gain[name] = float(sigma[above].sum()) / (noise * largest) if noise * largest else 0.0
    return Found(gain)


def _has_adapters(model: nn.Module) -> bool:
    return any(isinstance(each, LoRA) for each in model.modules())


# What it costs


def _cost(kind: Kind, layers: Layers, batches: Sequence[Batch], ranks: Mapping[str, int]) -> float:
    """Count multiplications, in those of a plain forward and backward pass over the batches."""
    shapes = layers.shapes
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    squares = sum(batch["input_ids"].numel() * batch["input_ids"].shape[1] for batch in batches)
    plain = sum(2 * tokens * m * n for m, n in shapes.values())  # x Wᵀ and g W: m n for each token
    sketch = sum(tokens * (10 * SKETCH_SIZE + 10) * (m + n) for m, n in shapes.values())
    factors = sum(tokens * (m * m + n * n + m * n) + 9 * (m**3 + n**3) for m, n in shapes.values())
    own = {
        "probe": sum(tokens * (r * (m + n) + 2 * r * r) for (m, n), r in _ranked(shapes, ranks)),
        "fisher": sum(min(squares * (m + n), tokens * m * n) for m, n in shapes.values()),
        "gradient": sketch,
        "kfac_gradient": sketch + factors,
        "magnitude": sum(2 * (m + n) * r * r for (m, n), r in _ranked(shapes, ranks)),
        "snr": sum(2 * m * n * min(m, n) for m, n in shapes.values()),
    }
    return (own[kind] + (plain if kind in LOOK_AT_EXAMPLES else 0)) / plain


def _ranked(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> list[tuple[tuple[int, int], int]]:
    return [(shape, ranks.get(name, 0)) for name, shape in shapes.items()]
