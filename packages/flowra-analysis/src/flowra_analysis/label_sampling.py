"""Losses under labels drawn from the model: what turns the empirical Fisher into the Fisher.

F = E_x E_{y ~ p(·|x)}[∇ log p(y|x) ∇ log p(y|x)ᵀ]: the labels are the model's own, not those of the data. So all that
is measured on per-example gradients (:class:`EmpiricalFisher`, :class:`DiagonalFisher`, the K-FAC factors) measures the
Fisher if the loss it is given draws its labels; for cross-entropy and for half squares that is the generalised
Gauss-Newton matrix. No labels of the data are needed. The labels are drawn anew with each call: several passes over the
same batches are several draws, and the estimates are those of so many more examples.

Source: Kunstner, Balles & Hennig (2019), arXiv:1905.12558, for the difference and when it misleads; Martens (2020),
arXiv:1412.1193, section 9, for the equality with Gauss-Newton.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["drawn_class_losses", "drawn_target_losses", "drawn_token_losses"]

CHUNK_NUMBERS = 2**22
"""Probabilities that are computed at a time in float64, 32 MiB; at least those of one label."""


def drawn_class_losses(logits: Tensor, *, generator: torch.Generator) -> Tensor:
    """Compute each example's cross-entropy with a class drawn from the model.

    Args:
        logits: ``(N, K)``, floating point, with its graph. −∞ is a class that is never drawn.
        generator: where the draws come from, on any device. With one on the CPU they are the same for logits on each
            device, but for rounding. Give each process its own.

    Returns:
        ``(N,)``, −log p(label), in the dtype of the logits, at least float32.

    Raises:
        ValueError: if the shape is not this, or a distribution is not finite.

    >>> model, batches, generator = torch.nn.Linear(6, 4), [torch.ones(5, 6)], torch.Generator().manual_seed(0)
    >>> from flowra_analysis import fisher_trace
    >>> loss = lambda model, batch: drawn_class_losses(model(batch), generator=generator)
    >>> trace, standard_error = fisher_trace(model, batches, loss, [""])[""]
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point (N, K), got {logits.dtype} {tuple(logits.shape)}")
    return _drawn_losses(logits, generator)


def drawn_token_losses(
    logits: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"], generator: torch.Generator
) -> Tensor:
    """Compute each example's cross-entropy with a token drawn from the model at every real position.

    The positions of an example are drawn independently, each given what the model saw, that is, the text as it is.

    Args:
        logits: ``(N, T, K)``, floating point, with its graph. −∞ is a token that is never drawn.
        mask: ``(N, T)``, nonzero at the positions that the loss counts; what the others hold does not matter. A causal
            model's loss on ``labels[:, 1:]`` counts ``logits[:, :-1]`` where ``attention_mask[:, 1:]`` is one.
        reduction: over the real positions of an example, as in the loss that is trained with: ``"sum"`` is the
            log-likelihood of the text, and gives the Fisher; ``"mean"`` gives that of each example divided by the
            square of their number.
        generator: see :func:`drawn_class_losses`.

    Returns:
        ``(N,)``, in the dtype of the logits, at least float32.

    Raises:
        ValueError: if the shapes are not these, an example has no real position, or a distribution is not finite.
    """
    if logits.ndim != 3 or not logits.is_floating_point() or mask.shape != logits.shape[:2]:
        raise ValueError(
            f"logits and mask must be floating point (N, T, K) and (N, T), got {logits.dtype} {tuple(logits.shape)} and"
            f" {tuple(mask.shape)}"
        )
    if reduction not in {"sum", "mean"}:
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    real = (mask != 0).to(logits.device)
    counts = real.sum(1)
    if not counts.all():
        raise ValueError(
            f"mask must have a real position in each example, got none in example {int((counts == 0).nonzero()[0])}."
            " Leave it out."
        )
    examples = real.nonzero()[:, 0]
    losses = _drawn_losses(logits[real], generator)
    sums = losses.new_zeros(len(logits)).index_add(0, examples, losses)
    return sums if reduction == "sum" else sums / counts


def drawn_target_losses(predictions: Tensor, *, generator: torch.Generator) -> Tensor:
    """Compute half the squared distance of each prediction to a target drawn from a unit normal around it.

    The model of regression behind the loss ½‖y − ŷ‖², summed over the outputs of an example. Behind c times that loss
    (a mean over outputs, say) is a normal of variance 1/c, whose Fisher is c times this one: multiply the result by √c.

    Args:
        predictions: ``(N, …)``, floating point, with its graph.
        generator: see :func:`drawn_class_losses`.

    Returns:
        ``(N,)``, in the dtype of the predictions, at least float32.

    Raises:
        ValueError: if the predictions are not floating point or have no example axis.
    """
    if predictions.ndim < 1 or not predictions.is_floating_point():
        raise ValueError(
            f"predictions must be floating point (N, …), got {predictions.dtype} {tuple(predictions.shape)}"
        )
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    noise = torch.randn(wide.shape, dtype=torch.float64, device=generator.device, generator=generator).to(wide)
    return (wide.detach() + noise - wide).square().unsqueeze(1).flatten(1).sum(1) / 2


def _drawn_losses(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label for each row of logits ``(R, K)`` and return −log p of it, ``(R,)``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normalisers = wide.logsumexp(1)
    if not torch.isfinite(normalisers).all():
        row = int((~torch.isfinite(normalisers)).nonzero()[0])
        raise ValueError(
            f"logits must give finite distributions, got log Σ exp = {float(normalisers[row])} for distribution {row}."
            " Check the inputs of this batch, or compute in a wider dtype."
        )
    labels = _draw(wide.detach(), generator)
    return normalisers - wide.gather(1, labels.unsqueeze(1)).squeeze(1)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label for each row by inverting its distribution function at a uniform number from the generator."""
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=generator.device, generator=generator)
    size = max(1, CHUNK_NUMBERS // logits.shape[1])
    labels = []
    for rows, at in zip(logits.split(size), uniform.to(logits.device).split(size), strict=True):
        distribution = rows.double().softmax(1).cumsum(1)
        labels.append(torch.searchsorted(distribution, at * distribution[:, -1:], right=True).squeeze(1))
    return torch.cat(labels)
