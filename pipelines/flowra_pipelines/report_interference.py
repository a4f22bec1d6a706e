"""The page that says what a merge costs: the advice, tables, and pictures, in one file that needs nothing else.

As in ``flowra report``, the page holds its pictures as SVG, has no script and no link to elsewhere, and forbids its
browser to load anything. Names of tasks and modules are text: they are escaped, never markup.
"""

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from flowra_compose.interference_report import InterferenceReport, ModuleInterference, TaskScores
from flowra_compose.recommendation import LARGE_INTERFERENCE, SMALL_INTERFERENCE, Recommendation, recommend
from flowra_pipelines import interference_figures
from flowra_pipelines.errors import UserError
from flowra_pipelines.interference_figures import CAPTIONS, Hovers
from flowra_pipelines.profile_commands import printable
from flowra_pipelines.report_parts import picture, table
from flowra_pipelines.whole_files import replacing

__all__ = ["interference_page", "write_interference_page"]

DPI = 160
LARGEST = 1e100
"""Energy that can be told in a table."""
BASIS = {
    "measured": "measured scores",
    "predicted": "interference predicted from statistics",
    "geometry": "the geometry of the updates alone",
}
WORDS = {
    "merge": "Merge: one adapter for all tasks.",
    "fuse": "Fuse: keep all adapters, and let a gate say at each input how much of each is taken.",
    "keep apart": "Keep apart: each task goes on with its own adapter.",
}


def interference_page(report: InterferenceReport, *, title: str = "Merge") -> tuple[dict[str, Figure], str]:
    """Draw a report, and write the page.

    Args:
        report: of any merge; what it does not know is left out.
        title: of the page.

    Returns:
        Name to picture, and the page as HTML.

    Raises:
        UserError: if an energy is too large to be told.
    """
    for name, module in report.modules.items():
        largest = max(module.merged_energy, module.sum_energy, *(each.energy for each in module.tasks))
        if largest > LARGEST:
            raise UserError(f"energies must be at most {LARGEST:g} to be drawn, got {largest!r} for {printable(name)}")
    drawn = _figures(report)
    return {name: figure for name, (figure, _) in drawn.items()}, _page(report, drawn, title)


def write_interference_page(report: InterferenceReport, path: Path, *, title: str = "Merge") -> list[Path]:
    """Write the page, and each picture beside it as ``<page>_<picture>.png``.

    Args:
        report: what is shown.
        path: of the page, such as ``out.html``; replaced if it is there.
        title: of the page.

    Returns:
        The files, the page first.

    Raises:
        UserError: if the report cannot be shown.
    """
    figures, page = interference_page(report, title=title)
    paths = [path, *(path.with_name(f"{path.stem}_{name}.png") for name in figures)]
    with replacing(*paths) as (html_file, *pictures):
        for figure, file in zip(figures.values(), pictures, strict=True):
            figure.savefig(file, format="png", dpi=DPI)
        html_file.write_text(page, encoding="utf-8")
    return paths


Drawn = Mapping[str, tuple[Figure, Hovers]]


def _figures(report: InterferenceReport) -> dict[str, tuple[Figure, Hovers]]:
    found: dict[str, tuple[Figure, Hovers]] = {}
    tasks = report.tasks
    cosines = report.pair_means("cosine")
    if cosines:
        found["task_cosines"] = interference_figures.task_pairs(tasks, {"": cosines}, label="cosine", signed=True)
        overlaps = {"rows": report.pair_means("row_overlap"), "columns": report.pair_means("column_overlap")}
        found["task_overlaps"] = interference_figures.task_pairs(tasks, overlaps, label="mean cos²", signed=False)
    talk = {
        name: {
            module: value
            for module, each in report.modules.items()
            if (value := each.tasks[index].cross_talk) is not None
        }
        for index, name in enumerate(tasks)
    }
    if any(talk.values()):
        found["cross_talk"] = interference_figures.module_maps(talk, label="cross-talk", logarithmic=True)
    cancelled = {name: each.cancelled for name, each in report.modules.items() if each.cancelled is not None}
    if cancelled and len(tasks) > 1:
        label = "share that cancels"
        found["sign_conflicts"] = interference_figures.module_maps({"": cancelled}, label=label, logarithmic=False)
    measured = _measured(report)
    if measured or report.predicted:
        limits = SMALL_INTERFERENCE, LARGE_INTERFERENCE
        figure = interference_figures.predicted_and_measured(report.predicted, measured, limits)
        found["predicted_and_measured"] = figure, {}
    return found


def _measured(report: InterferenceReport) -> dict[str, float]:
    return {name: one.interference for name, one in report.measured.items() if one.interference is not None}


# the page


def _page(report: InterferenceReport, drawn: Drawn, title: str) -> str:
    pictures = {name: _hovering(name, figure, hovers) for name, (figure, hovers) in drawn.items()}
    advice = recommend(report)
    sections = [
        ("advice", "What to do", _advice(advice)),
        ("tasks", "Tasks", _task_table(report) + _joined(pictures, "predicted_and_measured")),
        ("pairs", "Tasks against tasks", _pair_table(report) + _joined(pictures, "task_cosines", "task_overlaps")),
        ("places", "Where it happens", _joined(pictures, "cross_talk", "sign_conflicts")),
        ("modules", "All modules", _module_table(report)),
    ]
    sections = [each for each in sections if each[2]]
    contents = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    style = files("flowra_pipelines").joinpath("report_style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    shown = escape(printable(title))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Interference: {shown}</title><style>{style}</style></head><body>"
        f'<div class="layout"><header><p class="overline">Interference</p><h1>{shown}</h1>'
        f'<p class="soft">What it costs each task when adapters become one.</p>{_numbers(report, advice)}</header>'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>{body}</main></div></body></html>\n'
    )


def _numbers(report: InterferenceReport, advice: Recommendation) -> str:
    """Show the sizes that everything else refers to."""
    worst, drop = report.worst_task, report.largest_drop
    shown = {
        "advice": advice.advice,
        "merged by": _merged_by(report),
        "tasks": f"{len(report.tasks):,}",
        "modules": f"{len(report.modules):,}",
        "energy kept": _percent(report.energy_kept),
        "most is lost by": None if worst is None else f"{printable(worst[0])} ({worst[1]:.1%})",
        "largest drop": None if drop is None else f"{printable(drop[0])} ({drop[1]:.4g})",
    }
    rows = (f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in shown.items() if value)
    return f'<dl class="numbers">{"".join(rows)}</dl>'


def _merged_by(report: InterferenceReport) -> str | None:
    """Say rule and settings in a line; None where they are not known."""
    rule = report.settings.get("rule")
    others = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in report.settings.items()
        if key != "rule"
    ]
    return printable(", ".join(([str(rule)] if rule else []) + others)) or None


def _advice(advice: Recommendation) -> str:
    reasons = "".join(f"<li>{escape(_plain(line))}</li>" for line in advice.reasons)
    change = "".join(f"<li>{escape(_plain(line))}</li>" for line in advice.would_change)
    return (
        f"<p><strong>{WORDS[advice.advice]}</strong></p>"
        f'<p class="soft">By {BASIS[advice.basis]}; the task that suffers most decides.</p><ul>{reasons}</ul>'
        f"<h3>What would change this</h3><ul>{change}</ul>"
    )


def _task_table(report: InterferenceReport) -> str:
    predicted, measured, scores = report.predicted, report.measured, report.scores or {}
    projections, distances = report.projections, report.distances
    advice = recommend(report).by_task
    rows = []
    for name in report.tasks:
        one, score = measured.get(name), scores.get(name)
        rows.append([
            printable(name),
            advice[name],
            _percent(projections.get(name)),
            _number(distances.get(name)),
            _percent(predicted.get(name)),
            *_scores(score),
            _percent(None if one is None else one.interference),
            _percent(None if one is None else one.retention),
            "–" if one is None else f"{one.drop:.4g}",
        ])
    headings = ["task", "advice", "own update in the merged one", "squared distance", "predicted loss", "base"]
    return table([*headings, "single", "merged", "measured loss", "kept of the score", "drop"], rows)


def _scores(score: TaskScores | None) -> list[str]:
    return ["–"] * 3 if score is None else [f"{value:.4g}" for value in (score.base, score.single, score.merged)]


def _pair_table(report: InterferenceReport) -> str:
    numbers = ("cosine", "row_overlap", "row_angle", "column_overlap", "column_angle", "sign_conflict")
    means = {number: report.pair_means(number) for number in numbers}  # type: ignore[arg-type]
    rows = []
    for pair in means["cosine"]:
        found = [means[number].get(pair) for number in numbers]
        shown = [_degrees(v) if "angle" in n else _number(v) for n, v in zip(numbers, found, strict=True)]
        rows.append([f"{printable(pair[0])}, {printable(pair[1])}", *shown])
    headings = ["tasks", "cosine", "overlap of rows", "smallest angle", "overlap of columns", "smallest angle"]
    return table([*headings, "sign conflict"], rows) if rows else ""


def _module_table(report: InterferenceReport) -> str:
    """List the modules, those first where tasks miss most; else where most cancels."""
    known = report.metric is not None

    def worst(module: ModuleInterference) -> float:
        talk = [value for each in module.tasks if (value := each.cross_talk) is not None]
        return max(talk, default=-1.0) if known else (module.cancelled or 0.0)

    rows = [
        [
            printable(name),
            " × ".join(map(str, module.shape)),
            str(sum(each.rank > 0 for each in module.tasks)),
            str(module.merged_rank),
            _percent(module.merged_energy / module.sum_energy if module.sum_energy else None),
            _number(worst(module) if known and worst(module) >= 0 else None),
            _percent(module.cancelled),
            _number(module.singular_task_interference),
            _percent(module.truncation_loss),
        ]
        for name, module in sorted(report.modules.items(), key=lambda item: -worst(item[1]))
    ]
    headings = ["module", "shape", "tasks", "rank", "energy kept", "largest cross-talk", "cancelled by signs"]
    shown = table([*headings, "singular-task interference", "lost by truncation"], rows)
    return f"<details><summary>{len(rows):,} modules, the worst first</summary>{shown}</details>"


def _hovering(name: str, figure: Figure, hovers: Hovers) -> str:
    """Put a picture into the page whose cells say what they are where the pointer rests."""
    drawn = picture(name, figure, CAPTIONS[name])
    for cell, said in hovers.items():
        for part in (cell, f"{cell}-text"):
            start = f'<g id="{name}-{part}">'
            drawn = drawn.replace(start, f"{start}<title>{escape(_plain(said))}</title>", 1)
    return drawn


def _plain(text: str) -> str:
    """Write what does not print as escapes, of a text of any length."""
    return "".join(map(printable, text))


def _joined(pictures: Mapping[str, str], *names: str) -> str:
    return "".join(pictures.get(name, "") for name in names)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{57.29577951308232 * value:.1f}°"
