"""Does an adapter's subspace lie where the gradient of the weight is, and when in training?

For an update B A of a weight (m, n), with P_A the projector on the row space of A, P_B that on the column space of B,
and G (m, n) the gradient of the weight W + s B A at that moment:

    right share ‖G P_A‖²/‖G‖²     left share ‖P_B G‖²/‖G‖²     both ‖P_B G P_A‖²/‖G‖²

For a random subspace they are r/n, r/m and their product on average, since E[P] = (r/n) I. Of G, what B A can follow to
first order by moving both factors is G − (I − P_B) G (I − P_A): its share is right + left − both.

The overlap with the leading k singular vectors of G is that of Hu et al. (2022, section 7.2 and appendix G),
φ = ‖U_kᵀ Q‖²/min(k, r), the mean squared cosine of the principal angles: 1 if one space holds the other, 0 if they are
orthogonal, max(k, r)/n on average for a random one. All of this depends on the spaces only: not on the scale of A
against B, and not on the basis of the rank.

Source: Hu et al. (2022), arXiv:2106.09685, for φ, who measure it between updates and between an update and W; here it
is taken with the gradient, over training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowra_analysis.gradient_spectrum import GradientSpectrum

__all__ = [
    "PHASES",
    "Alignment",
    "AlignmentHistory",
    "PhaseSummary",
    "orthonormal_basis",
    "subspace_alignment",
    "subspace_overlap",
]

ROUNDING = 1e-3
"""By which a share that was computed in single precision may miss [0, 1]."""
PHASES = (500, 1000, 2000)
"""Where phases of training end: steps 0–500, 500–1000, 1000–2000, and later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """How an adapter's subspaces lie to the gradient of its weight at one moment. All shares are in [0, 1]."""

    shape: tuple[int, int]
    """(m, n) of the weight."""
    rank_A: int
    """Dimension of the row space of A."""
    rank_B: int
    """Dimension of the column space of B; 0 at the birth of LoRA."""
    leading: int
    """k: leading singular vectors of G that the overlaps are about; fewer than asked for where G has fewer."""
    right_share: float
    """‖G P_A‖²/‖G‖²; 0 for a zero gradient, as all that follow."""
    left_share: float
    """‖P_B G‖²/‖G‖²."""
    both_share: float
    """‖P_B G P_A‖²/‖G‖²."""
    right_overlap: float
    """φ of the row space of A and the leading right singular vectors; 0 where one of the two is empty."""
    left_overlap: float
    """φ of the column space of B and the leading left singular vectors."""
    uncertainty: float
    """‖G − Ĝ‖/‖G‖, as estimated, where G was sketched as Ĝ: how far the root of each share may be off. Else 0."""

    @property
    def tangent_share(self) -> float:
        """Share of G that B A can follow to first order: right + left − both."""
        return self.right_share + self.left_share - self.both_share

    @property
    def expected_right_share(self) -> float:
        """Mean of the right share over random subspaces of the same rank."""
        return self.rank_A / self.shape[1]

    @property
    def expected_left_share(self) -> float:
        """Likewise of the left share."""
        return self.rank_B / self.shape[0]

    @property
    def expected_both_share(self) -> float:
        """Likewise of the share of both, the two subspaces drawn independently."""
        return self.expected_right_share * self.expected_left_share

    @property
    def expected_tangent_share(self) -> float:
        """Likewise of the tangent share."""
        return self.expected_right_share + self.expected_left_share - self.expected_both_share

    @property
    def expected_right_overlap(self) -> float:
        """Likewise of the right overlap: max(k, r)/n."""
        return _expected_overlap(self.leading, self.rank_A, self.shape[1])

    @property
    def expected_left_overlap(self) -> float:
        """Likewise of the left overlap: max(k, r)/m."""
        return _expected_overlap(self.leading, self.rank_B, self.shape[0])


MEASURES = ("right_share", "left_share", "both_share", "tangent_share", "right_overlap", "left_overlap")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSummary:
    """Alignment in one phase of training: a module's value is its mean over the phase; the rest is over modules."""

    start: int
    """First step of the phase."""
    end: int | None
    """The step before which it ends; None for the last."""
    checkpoints: int
    """Steps of the phase at which something was measured."""
    modules: int
    mean: Mapping[str, float]
    """``right_share``, ``left_share``, ``both_share``, ``tangent_share``, ``right_overlap`` and ``left_overlap``."""
    deviation: Mapping[str, float]
    """Standard deviation over modules, as of a population."""
    low: Mapping[str, float]
    """The least module."""
    high: Mapping[str, float]
    """The greatest."""
    expected: Mapping[str, float]
    """Mean of what random subspaces of the same ranks would have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentHistory:
    """Alignments over training. A value: each step returns a new one.

    >>> _ = torch.manual_seed(0)
    >>> gradient, lora_A, lora_B = torch.randn(6, 8), torch.randn(2, 8), torch.zeros(6, 2)
    >>> measured = subspace_alignment(lora_A, lora_B, gradient, leading=3)
    >>> history = AlignmentHistory().update(0, {"layer": measured})
    >>> [(each.start, each.end, each.mean["left_share"]) for each in history.phases()]
    [(0, 500, 0.0)]
    """

    format_version: ClassVar[int] = 1

    steps: Mapping[int, Mapping[str, Alignment]] = field(default_factory=dict)
    """Finished optimiser steps to module name to alignment."""

    def update(self, step: int, alignments: Mapping[str, Alignment]) -> "AlignmentHistory":
        """Return the history with the alignments of one more step, or of more modules at that step.

        Args:
            step: finished optimiser steps, ≥ 0.
            alignments: by module name.

        Returns:
            The longer history, in the order of the steps.

        Raises:
            ValueError: if the step is negative, or there is an alignment of a module at this step already.
        """
        return self.merge(AlignmentHistory(steps={step: alignments}))

    def merge(self, other: "AlignmentHistory") -> "AlignmentHistory":
        """Return the history of both.

        Raises:
            ValueError: if a step is negative, or both hold an alignment of one module at one step.
        """
        ours, theirs = self.steps, other.steps
        merged: dict[int, Mapping[str, Alignment]] = {}
        for step in sorted(ours.keys() | theirs.keys()):
            mine, others = ours.get(step, {}), theirs.get(step, {})
            if step < 0 or mine.keys() & others.keys():
                twice = sorted(mine.keys() & others.keys())
                raise ValueError(f"steps must be ≥ 0 and hold each module once, got {twice or 'none'} twice at {step}")
            merged[step] = {**mine, **others}
        return AlignmentHistory(steps=merged)

    def phases(self, bounds: Sequence[int] = PHASES) -> list[PhaseSummary]:
        """Summarise by phases of training.

        Args:
            bounds: steps at which a phase ends and the next begins, ascending, > 0.

        Returns:
            One summary for each phase in which something was measured. A module that lacks some steps of a phase has
            the mean over those it has.

        Raises:
            ValueError: if the bounds are not ascending.
        """
        if any(low >= high for low, high in zip((0, *bounds), bounds, strict=False)):
            raise ValueError(f"bounds must be ascending and > 0, got {list(bounds)}")
        summaries = []
        for start, end in zip((0, *bounds), (*bounds, None), strict=True):
            inside = [each for step, each in self.steps.items() if start <= step and (end is None or step < end)]
            if any(inside):
                summaries.append(_summary(start, end, inside))
        return summaries

    def as_json(self) -> dict[str, Any]:
        """Return plain values, which :meth:`from_json` reads."""
        steps = {
            str(step): {name: {**asdict(each), "shape": list(each.shape)} for name, each in alignments.items()}
            for step, alignments in self.steps.items()
        }
        return {"format_version": self.format_version, "steps": steps}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AlignmentHistory":
        """Read what :meth:`as_json` returned.

        Returns:
            An equal history.

        Raises:
            ValueError: if it is of another version, a key is missing or unknown, or a value is not a finite number.
        """
        if content.get("format_version") != cls.format_version or content.keys() != {"format_version", "steps"}:
            raise ValueError(
                f"content must hold format_version {cls.format_version} and steps, got"
                f" {content.get('format_version')!r} and keys {sorted(content)}"
            )
        if not isinstance(content["steps"], Mapping):
            raise ValueError(f"steps must be an object, got {type(content['steps']).__name__}")
        history = cls()
        for step, alignments in content["steps"].items():
            if not step.isdecimal():
                raise ValueError(f"steps must be whole numbers ≥ 0, got {step!r}")
            if not isinstance(alignments, Mapping):
                raise ValueError(f"steps must hold objects, got {alignments!r:.200} at step {step}")
            read = {name: _read(entry, f"module {name!r} at step {step}") for name, entry in alignments.items()}
            history = history.update(int(step), read)
        return history


def subspace_alignment(
    lora_A: Tensor, lora_B: Tensor, gradient: Tensor | GradientSpectrum, *, leading: int = 8
) -> Alignment:
    """Measure how an adapter's subspaces lie to the gradient of its weight.

    Args:
        lora_A: ``(r, n)``, floating point, finite. Directions that are switched off must be left out, or be zero.
        lora_B: ``(m, r)``.
        gradient: G ``(m, n)`` of the weight, W + s B A, at this moment; or what a sketch knows of it, whose share of
            ‖G‖² outside Ĝ then counts as lying outside all subspaces.
        leading: k ≥ 1, number of leading singular vectors of G for the overlaps.

    Returns:
        The alignment; computed in float64.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or k is out of range.

    >>> gradient = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    >>> lora_A, lora_B = torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    >>> found = subspace_alignment(lora_A, lora_B, gradient, leading=1)
    >>> found.right_share, found.left_share, found.both_share, found.right_overlap, found.left_overlap
    (0.2, 0.8, 0.0, 0.0, 1.0)
    """
    left, sigma, right, squared_norm, squared_error = _singular_vectors(gradient)
    m, n = len(left), len(right)
    if lora_A.ndim != 2 or lora_B.ndim != 2 or (len(lora_B), lora_B.shape[1], lora_A.shape[1]) != (m, len(lora_A), n):
        raise ValueError(
            f"lora_A and lora_B must have shapes (r, {n}) and ({m}, r), got {tuple(lora_A.shape)} and"
            f" {tuple(lora_B.shape)}"
        )
    if not 1 <= leading <= len(sigma):
        raise ValueError(f"leading must be in [1, {len(sigma)}], got {leading}. Take a larger size of the sketch.")
    rows, columns = orthonormal_basis(lora_A.T).to(right.device), orthonormal_basis(lora_B).to(left.device)
    inside_rows = sigma.unsqueeze(1) * (right.T @ rows)  # Uᵀ G P_A, in the basis of the rows
    inside_columns = (columns.T @ left) * sigma
    k = min(leading, int((sigma > 0).sum()))
    whole = squared_norm if k and squared_norm > 0 else math.inf  # all shares of a zero gradient are 0
    return Alignment(
        shape=(m, n),
        rank_A=rows.shape[1],
        rank_B=columns.shape[1],
        leading=k,
        right_share=_share(inside_rows, whole),
        left_share=_share(inside_columns, whole),
        both_share=_share(inside_columns @ (right.T @ rows), whole),
        right_overlap=subspace_overlap(right[:, :k], rows),
        left_overlap=subspace_overlap(left[:, :k], columns),
        uncertainty=math.sqrt(squared_error / whole),
    )


def orthonormal_basis(vectors: Tensor) -> Tensor:
    """Return an orthonormal basis of the space that vectors span.

    Args:
        vectors: ``(d, r)``, floating point, finite, one in each column, of any length and perhaps dependent.

    Returns:
        ``(d, rank)``, float64; the rank counts singular values above max(d, r) · ε · σ₁, ε that of float32, or of
        float64 for vectors in it.

    Raises:
        ValueError: if a value is not finite.
    """
    if not torch.isfinite(vectors).all():
        raise ValueError(f"vectors must be finite, got NaN or infinity in a matrix {tuple(vectors.shape)}")
    u, sigma, _ = torch.linalg.svd(vectors.detach().double(), full_matrices=False)
    basis: Tensor = u[:, : _rank(sigma, vectors)]
    return basis


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Compute φ = ‖UᵀV‖²/min(i, j), the mean squared cosine of the principal angles between two subspaces.

    Args:
        first: U ``(d, i)``, orthonormal columns.
        second: V ``(d, j)``, orthonormal columns.

    Returns:
        In [0, 1]; 0 where one of the two is empty.

    Raises:
        ValueError: if the two are not in one space.

    Source: Hu et al. (2022), arXiv:2106.09685, equation 4.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(
            f"first and second must have shapes (d, i) and (d, j), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    smaller = min(first.shape[1], second.shape[1])
    return min(1.0, float((first.T @ second).square().sum()) / smaller) if smaller else 0.0


def _singular_vectors(gradient: Tensor | GradientSpectrum) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Return left vectors, values and right vectors in float64, ‖G‖² and ‖G − Ĝ‖²."""
    if isinstance(gradient, GradientSpectrum):
        left, right = gradient.left.double(), gradient.right.double()
        return left, gradient.singular_values, right, gradient.squared_norm, gradient.squared_error
    if gradient.ndim != 2 or not torch.isfinite(gradient).all():
        raise ValueError(
            f"gradient must be a finite matrix (m, n), got shape {tuple(gradient.shape)}, or NaN or infinity"
        )
    left, sigma, right = torch.linalg.svd(gradient.detach().double(), full_matrices=False)
    sigma[_rank(sigma, gradient) :] = 0  # what may be rounding has no directions
    return left, sigma, right.T, float(sigma.square().sum()), 0.0


def _rank(sigma: Tensor, matrix: Tensor) -> int:
    """Count the singular values of a matrix that are not rounding."""
    epsilon = torch.finfo(torch.promote_types(matrix.dtype, torch.float32)).eps
    return int((sigma > max(matrix.shape) * epsilon * sigma[:1]).sum())


def _share(part: Tensor, whole: float) -> float:
    return min(1.0, float(part.square().sum()) / whole)


def _expected_overlap(leading: int, rank: int, dim: int) -> float:
    return max(leading, rank) / dim if leading and rank else 0.0


def _summary(start: int, end: int | None, inside: Sequence[Mapping[str, Alignment]]) -> PhaseSummary:
    """Average over the checkpoints of a phase for each module, then over modules."""
    names = list(dict.fromkeys(name for each in inside for name in each))

    def by_module(measure: str) -> Tensor:
        values = [[getattr(each[name], measure) for each in inside if name in each] for name in names]
        return torch.tensor([sum(each) / len(each) for each in values], dtype=torch.float64)

    found = {measure: by_module(measure) for measure in MEASURES}
    return PhaseSummary(
        start=start,
        end=end,
        checkpoints=len([each for each in inside if each]),
        modules=len(names),
        mean={key: float(each.mean()) for key, each in found.items()},
        deviation={key: float(each.std(correction=0)) for key, each in found.items()},
        low={key: float(each.min()) for key, each in found.items()},
        high={key: float(each.max()) for key, each in found.items()},
        expected={key: float(by_module(f"expected_{key}").mean()) for key in MEASURES},
    )


def _read(entry: Mapping[str, Any], where: str) -> Alignment:
    """Check the keys and types of an alignment in JSON."""
    names = {each.name for each in fields(Alignment)}
    if not isinstance(entry, Mapping) or entry.keys() != names:
        raise ValueError(f"keys must be {sorted(names)}, got {entry!r:.200}; for {where}")
    counts = [*entry["shape"], entry["rank_A"], entry["rank_B"], entry["leading"]] if _is_pair(entry["shape"]) else []
    if not counts or any(type(each) is not int or each < 0 for each in counts) or min(entry["shape"]) < 1:
        raise ValueError(f"shape, ranks and leading must be whole numbers ≥ 0, got {entry!r:.200}; for {where}")
    numbers = {key: entry[key] for key in names - {"shape", "rank_A", "rank_B", "leading"}}
    if any(type(each) not in (int, float) or not math.isfinite(each) for each in numbers.values()):
        raise ValueError(f"shares must be finite numbers, got {numbers}; for {where}")
    rest = numbers.pop("uncertainty")
    if rest < 0 or any(not -ROUNDING <= each <= 1 + ROUNDING for each in numbers.values()):
        raise ValueError(f"shares must be in [0, 1] and the uncertainty ≥ 0, got {numbers}, {rest}; for {where}")
    return Alignment(**{**entry, "shape": tuple(entry["shape"])})


def _is_pair(shape: object) -> bool:
    return isinstance(shape, list | tuple) and len(shape) == 2
