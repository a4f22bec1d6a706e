"""Do the estimators mean something? Their order against that of measured loss changes, and ``validation.json``.

A gain is compared with the loss change of a module; a gain per parameter, which is what ψ orders modules by, with the
loss change per parameter that was taken away. Only the order is compared, because estimators speak in different units.
"""

import json
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flowra_analysis import FlowProfile, rank_correlation
from flowra_pipelines.validation_runs import LossChange
from flowra_pipelines.whole_files import replacing

__all__ = ["spearman", "spearman_interval", "validation", "write_validation"]

FORMAT_VERSION = 1
JSON_NAME = "validation.json"
Array = NDArray[np.float64]


def validation(
    profile: FlowProfile,
    ablations: Mapping[str, Mapping[str, LossChange]],
    *,
    costs: Mapping[str, float] | None = None,
    seconds_ratios: Mapping[str, float] | None = None,
    stability: Mapping[str, Mapping[str, float]] | None = None,
    provenance: Mapping[str, str | int | float] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Compare every estimator that a profile holds with every ablation.

    An estimator is a statistic ``gain_<name>``; ``psi_<name>_stderr`` is its ψ's standard error.

    Args:
        profile: with the estimators' statistics.
        ablations: name to module name to loss change; an ablation may cover some of the modules only.
        costs: estimator to its cost in plain forward and backward passes over the same examples.
        seconds_ratios: estimator to its measured time over that of such a pass. Leave it out for equal bytes.
        stability: estimator to name of a comparison to a rank correlation.
        provenance: how the ablations came about; the profile's own is kept, too.
        seed: of the bootstrap.
        resamples: of the modules, for each interval.

    Returns:
        The content of ``validation.json``; docs/formats/validation.md.

    Raises:
        ValueError: if the profile holds no estimator, or an ablation a module that the profile lacks.
    """
    gains = _gains(profile)
    unknown = sorted({name for each in ablations.values() for name in each} - profile.modules.keys())
    if unknown:
        raise ValueError(f"ablations must be of modules of the profile, got {unknown[:3]}")
    return {
        "format_version": FORMAT_VERSION,
        "ablations": {
            ablation: {
                name: {"loss_change": each.loss_change, "stderr": each.stderr, "parameters": each.parameters}
                for name, each in by_module.items()
            }
            for ablation, by_module in ablations.items()
        },
        "reliability": {ablation: _reliability(by_module) for ablation, by_module in ablations.items()},
        "estimators": {
            name: {
                **_correlations(profile, gain, ablations, seed=seed, resamples=resamples),
                "cost": (costs or {}).get(name),
                "seconds_ratio": (seconds_ratios or {}).get(name),
                "psi_stderr_median": _median_error(profile, name),
                "stability": dict((stability or {}).get(name, {})),
            }
            for name, gain in gains.items()
        },
        "agreement": _agreement(gains),
        "provenance": {
            **{f"profile_{key}": value for key, value in profile.provenance.items()},
            **(provenance or {}),
            "bootstrap_seed": seed,
            "bootstrap_resamples": resamples,
        },
    }


def write_validation(content: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``validation.json`` under a temporary name and rename it; equal values give equal bytes.

    Returns:
        Its path.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    path = Path(folder) / JSON_NAME
    with replacing(path) as (partial,):
        partial.write_text(text, encoding="utf-8")
    return path


def spearman(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    """Compute Spearman's rank correlation over the common names; ties share their mean rank.

    Returns:
        In [-1, 1]; None where it is not defined: under two names, or all values the same on one side.
    """
    names = sorted(first.keys() & second.keys())
    return rank_correlation([first[name] for name in names], [second[name] for name in names])


def spearman_interval(
    first: Mapping[str, float], second: Mapping[str, float], *, seed: int, resamples: int
) -> dict[str, float] | None:
    """Compute Spearman's rank correlation with a 95 % interval, by a percentile bootstrap over the names.

    Returns:
        ``value``, ``low`` and ``high``; None where the correlation is not defined. Resamples in which it is not are
        left out.
    """
    value = spearman(first, second)
    if value is None:
        return None
    names = sorted(first.keys() & second.keys())
    chosen = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    drawn = [np.array([each[name] for name in names])[chosen] for each in (first, second)]
    rho = _row_by_row(*drawn)
    rho = rho[~np.isnan(rho)]
    low, high = np.percentile(rho, [2.5, 97.5]) if len(rho) else (value, value)
    return {"value": value, "low": float(low), "high": float(high)}


def _gains(profile: FlowProfile) -> dict[str, dict[str, float]]:
    """Collect the estimators by name, those that all modules have."""
    found: dict[str, dict[str, float]] = {}
    for name, module in profile.modules.items():
        for key, value in module.statistics.items():
            if key.startswith("gain_") and not key.endswith("_stderr"):
                found.setdefault(key.removeprefix("gain_"), {})[name] = value
    if not found:
        raise ValueError("profile must hold a statistic gain_<estimator>, got none. Calibrate again.")
    return dict(sorted(found.items()))


def _correlations(
    profile: FlowProfile,
    gain: Mapping[str, float],
    ablations: Mapping[str, Mapping[str, LossChange]],
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Compare one estimator with each ablation, by module and by parameter."""
    density = {name: value / profile.modules[name].cost_per_rank for name, value in gain.items()}
    by_module, by_parameter = {}, {}
    for ablation, changes in ablations.items():
        whole = {name: each.loss_change for name, each in changes.items()}
        each_parameter = {name: each.loss_change / each.parameters for name, each in changes.items()}
        by_module[ablation] = spearman_interval(gain, whole, seed=seed, resamples=resamples)
        by_parameter[ablation] = spearman_interval(density, each_parameter, seed=seed, resamples=resamples)
    return {"spearman": by_module, "spearman_per_parameter": by_parameter}


def _reliability(changes: Mapping[str, LossChange]) -> float | None:
    """Correlate the loss changes of two halves of the examples, as they would at full length (Spearman-Brown).

    Returns:
        In [0, 1], or None. Its square root is about the most that a correlation with anything else can reach.
    """
    first, second = ({name: each.halves[half] for name, each in changes.items()} for half in (0, 1))
    value = spearman(first, second)
    return None if value is None else max(0.0, 2 * value / (1 + value)) if value > -1 else 0.0


def _agreement(gains: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Compare the estimators' gains with each other."""
    table: dict[str, dict[str, float | None]] = {name: {} for name in gains}
    for one, other in combinations(gains, 2):
        table[one][other] = table[other][one] = spearman(gains[one], gains[other])
    return table


def _median_error(profile: FlowProfile, name: str) -> float | None:
    key = f"psi_{name}_stderr"
    errors = [module.statistics[key] for module in profile.modules.values() if key in module.statistics]
    return statistics.median(errors) if errors else None


def _row_by_row(first: Array, second: Array) -> Array:
    """Compute Spearman's correlation of each pair of rows, ``(rows,)``; NaN where a row does not vary."""
    ranks = [stats.rankdata(each, axis=1) for each in (first, second)]
    a, b = (each - each.mean(1, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore"):
        rho: Array = np.clip((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), -1.0, 1.0)
    return rho
