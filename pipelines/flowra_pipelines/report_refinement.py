"""The section of a report that says how rank moved, read from the files of the stages allocate and refine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flowra_adapters import read_checkpoint
from flowra_allocation import RankEvent, RankHistory, read_plan
from flowra_analysis import layer_type, update_spectrum
from flowra_pipelines import refinement_figures
from flowra_pipelines.errors import UserError
from flowra_pipelines.profile_commands import printable
from flowra_pipelines.refinement_figures import CAPTIONS, Shape, shape_of_spectrum
from flowra_pipelines.report_parts import picture, table

__all__ = ["Refinement", "adapter_shapes", "read_refinement", "refinement_figures_of", "refinement_section"]

HISTORY = "rank_history.json"
LARGEST = 2**62
COUNTS = ("dropped", "admitted", "silenced")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """What is known of how rank moved in a run."""

    history: RankHistory
    """With at least one event."""
    costs: Mapping[str, int] | None = None
    """Module name to parameters per unit of rank, from the plan; None without one."""
    shapes: Mapping[str, Shape] | None = None
    """Module name to what its final update looks like; None without an adapter."""


def read_refinement(run: Path) -> Refinement | None:
    """Read how rank moved in a run.

    Returns:
        What is known; None if the run has not come to refine, or its policy moves no rank.

    Raises:
        UserError: if a file is damaged.
    """
    path = run / "refine" / HISTORY
    if not path.is_file():
        return None
    history = _history(path)
    if not history.events:
        return None
    plan, adapter = run / "allocate", run / "refine" / "adapter"
    try:
        costs = {name: module.cost_per_rank for name, module in read_plan(plan).modules.items()}
    except ValueError as error:
        raise UserError(str(error)) from None
    if not history.initial.keys() <= costs.keys():
        raise UserError(f"plan must name the modules of the rank history, got others; in {plan}. Run `flowra refine`.")
    return Refinement(history=history, costs=costs, shapes=adapter_shapes(adapter))


def adapter_shapes(folder: Path) -> dict[str, Shape]:
    """Say what each module's final update looks like, from the singular values of ΔW = s · B A.

    Args:
        folder: with PEFT's files; E, where there is one, is in B.

    Returns:
        Module name to mean singular value, entropy and rank.

    Raises:
        UserError: if the files are damaged.
    """
    try:
        checkpoint = read_checkpoint(folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {
        name: shape_of_spectrum(abs(checkpoint.scalings[name]) * update_spectrum(lora_A, lora_B))
        for name, (lora_A, lora_B) in checkpoint.factors.items()
        if lora_A.ndim == 2 and len(lora_A)
    }


def refinement_figures_of(refinement: Refinement) -> dict[str, Figure]:
    """Draw how rank moved; name to picture."""
    figures = {
        "rank_over_time": refinement_figures.rank_over_time(refinement.history),
        "budget_path": refinement_figures.budget_path(refinement.history, refinement.costs),
    }
    if refinement.shapes:
        figures["magnitude_and_entropy"] = refinement_figures.magnitude_and_entropy(refinement.shapes)
    return figures


def refinement_section(refinement: Refinement, figures: Mapping[str, Figure]) -> str:
    """Write what the pictures show, the pictures themselves, the modules that changed, and the table of events."""
    history = refinement.history
    words = "".join(f"<li>{escape(line)}</li>" for line in _said(history))
    drawn = "".join(picture(name, figures[name], CAPTIONS[name]) for name in CAPTIONS if name in figures)
    return f"<ul>{words}</ul>{drawn}{_changed_table(history)}{_event_table(history)}"


def _said(history: RankHistory) -> list[str]:
    """Say in words what happened."""
    events = history.events
    last = events[-1]
    counts = {key: sum(sum(getattr(event, key).values()) for event in events) for key in COUNTS}
    shown = [f"{count:,} {key}" for key, count in counts.items() if count]
    settings = ", ".join(f"{printable(key)} {printable(str(value))}" for key, value in history.settings.items())
    ended = "in the" if last.parameters <= history.budget else "above the"
    return [
        f"Policy {printable(history.policy)} ({settings}).",
        f"{len(events):,} events from step {events[0].step:,} to {last.step:,};"
        f" directions: {', '.join(shown) or 'none'}.",
        f"At the end {last.parameters:,} parameters, {ended} budget of {history.budget:,}; at most {history.peak:,}.",
    ]


def _changed_table(history: RankHistory) -> str:
    """List the modules whose rank is not what was planned, the largest changes first."""
    final = history.events[-1].ranks
    changes = {name: final[name] - rank for name, rank in history.initial.items() if final[name] != rank}
    if not changes:
        return "<p>Every module has the rank that it began with.</p>"
    rows = [
        [printable(name), layer_type(name), str(history.initial[name]), str(final[name]), f"{changes[name]:+d}"]
        for name in sorted(changes, key=lambda each: (-abs(changes[each]), each))
    ]
    summary = f"{len(rows):,} of {len(final):,} modules changed rank, the largest changes first"
    content = table(["module", "type", "rank before", "final rank", "change"], rows)
    return f"<details><summary>{summary}</summary>{content}</details>"


def _event_table(history: RankHistory) -> str:
    rows = []
    for event in history.events:
        counts = [str(sum(getattr(event, key).values())) for key in COUNTS]
        touched = len({name for key in COUNTS for name in getattr(event, key)})
        gap = "–" if event.kkt_gap is None else f"{event.kkt_gap:.3g}"
        rows.append([f"{event.step:,}", f"{event.parameters:,}", f"{event.budget:,}", *counts, str(touched), gap])
    headings = ["step", "parameters", "allowed", *COUNTS, "modules touched", "KKT gap"]
    note = (
        '<p class="soft">Dropped, admitted and silenced count directions; a silenced one stays with E = 0. The KKT gap'
        " is the smallest gain per parameter that was kept less the largest that was dropped.</p>"
    )
    return f"<details><summary>{len(rows):,} events</summary>{note}{table(headings, rows)}</details>"


# the file


def _history(path: Path) -> RankHistory:
    """Read a rank history, checked: whatever is drawn of it is what it says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if type(version) is not int or version != RankHistory.format_version:
            raise ValueError(f"format_version must be {RankHistory.format_version}, got {version!r}")
        content.pop("seconds", None)
        content["steps"] = tuple(content["steps"])
        events = [RankEvent(**event) for event in content.pop("events")]
        history = RankHistory(**content, events=events)
        _check(history)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"rank history must follow docs/formats/rank_history.md, got {problem}; in {path}. Run `flowra refine`."
        ) from None
    return history


def _check(history: RankHistory) -> None:
    """Check types and ranges.

    Raises:
        ValueError: if a value is not of its form.
    """
    if not history.initial or type(history.policy) is not str or not isinstance(history.settings, dict):
        raise ValueError(f"history must name modules, a policy and settings, got {history.policy!r}")
    counts: list[Any] = [history.budget, history.peak, *history.steps, *history.initial.values()]
    before = 0
    for event in history.events:
        if event.ranks.keys() != history.initial.keys():
            raise ValueError(f"event must have ranks of the modules it began with, got others at step {event.step!r}")
        counts += [event.step, event.parameters, event.budget, *event.ranks.values()]
        for key in COUNTS:
            found = getattr(event, key)
            if not found.keys() <= event.ranks.keys():
                raise ValueError(f"{key} must name modules of the history, got others at step {event.step!r}")
            counts += found.values()
        if event.kkt_gap is not None and type(event.kkt_gap) not in (int, float):
            raise ValueError(f"kkt_gap must be a number or null, got {event.kkt_gap!r}")
        if type(event.step) is not int or event.step <= before:
            raise ValueError(f"steps must rise from event to event, got {event.step!r} after {before}")
        before = event.step
    wrong = [count for count in counts if type(count) is not int or not 0 <= count < LARGEST]
    if wrong:
        raise ValueError(f"counts must be whole numbers ≥ 0, got {wrong[0]!r}")
