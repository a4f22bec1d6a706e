"""``flowra report``: a profile as pictures and one page that needs nothing else.

The page holds its pictures as SVG, has no script and no link to elsewhere, and forbids its browser to load anything
(`Content-Security-Policy`). Whatever comes from the profile is text: it is escaped, never markup.
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from flowra_analysis import FlowProfile, layer_type, rank_correlation, summarise
from flowra_pipelines import report_figures
from flowra_pipelines.errors import UserError
from flowra_pipelines.module_grid import layer_and_kind
from flowra_pipelines.profile_commands import find_profile, printable, read_profile_at
from flowra_pipelines.progress import console
from flowra_pipelines.report_parts import picture, table
from flowra_pipelines.report_refinement import (
    Refinement,
    read_refinement,
    refinement_figures_of,
    refinement_section,
)
from flowra_pipelines.report_validation import ABLATIONS, Validation, parse_validation, read_validation
from flowra_pipelines.whole_files import replacing

__all__ = ["profile_report", "show_report", "write_report"]

PAGE = "report.html"
DPI = 160
RECORD = "stage.json"
LARGEST = 1e100
"""Absolute value of a statistic that can be drawn."""
SHOWN = 3
CAPTIONS = {
    "sensitivity": "ψ of each module with its standard error. Red lies above the median module, blue below it; hatched"
    " cells lie within two standard errors of ½ and cannot be told from the median.",
    "layer_types": "Each mark is a module; below them are mean and spread (standard deviation) of the type.",
    "spectra": "The i-th largest value over the largest. Lines are medians over the modules of a type, bands hold 10 to"
    " 90 % of them. A steep line means that few directions carry most.",
    "effective_ranks": "exp of the entropy of the normalised values: how many directions are really in use. Where a"
    " spectrum is a sketch or a low-rank update, its length is the most that it can show.",
    "estimator_agreement": "Spearman's rank correlation between what two estimators say of the modules.",
    "ablation_correlations": "How well each estimator ranks modules as an ablation does, with 95 % intervals.",
    "ablation_scatter": "What happened to the loss over what ψ had said, module by module, with standard errors. ψ is a"
    " density, so the loss is taken per parameter where it is known how many were taken away.",
}


def profile_report(
    profile: FlowProfile,
    validation: Mapping[str, object] | None = None,
    refinement: Refinement | None = None,
) -> tuple[dict[str, Figure], str]:
    """Draw a profile, and how rank moved, and write the page.

    Args:
        profile: of any model; what it does not know is left out.
        validation: what ``validation.json`` holds, or None.
        refinement: how rank moved in the run that the profile is of, or None.

    Returns:
        Name to picture, and the page as HTML.

    Raises:
        UserError: if the validation is not of its form, or a statistic is too large to be drawn.
    """
    for name, module in profile.modules.items():
        for key, value in module.statistics.items():
            if abs(value) > LARGEST:
                raise UserError(
                    f"statistics must be at most {LARGEST:g} to be drawn, got {value!r} for {printable(key)} of"
                    f" {printable(name)}"
                )
    known = Validation() if validation is None else parse_validation(validation)
    figures = _figures(profile, known)
    moved = {} if refinement is None else refinement_figures_of(refinement)
    section = "" if refinement is None else refinement_section(refinement, moved)
    return {**figures, **moved}, _page(profile, known, figures, section)


def write_report(path: Path, to: Path | None = None) -> list[Path]:
    """Write the report of a profile, and of how rank moved in its run: ``report.html``, and each picture as PNG.

    Args:
        path: folder of a run or of its stage calibrate, or a ``profile.json``.
        to: folder to write; by default ``report``, beside the stage or in the folder of the profile. Never in the
            folder of a stage, whose files are recorded.

    Returns:
        The files, the page first.

    Raises:
        UserError: if there is no profile, or it or what lies beside it is damaged.
    """
    source = find_profile(path)
    run = source.absolute().parent if (source / RECORD).is_file() else None
    refinement = None if run is None else read_refinement(run)
    figures, page = profile_report(read_profile_at(source), read_validation(source), refinement)
    to = to or (run or source) / "report"
    paths = [to / PAGE, *(to / f"{name}.png" for name in figures)]
    with replacing(*paths) as (html_file, *pictures):
        for figure, file in zip(figures.values(), pictures, strict=True):
            figure.savefig(file, format="png", dpi=DPI)
        html_file.write_text(page, encoding="utf-8")
    return paths


def show_report(path: Path, to: Path | None) -> None:
    """Write the report and say where it is."""
    page, *pictures = write_report(path, to)
    console.print(f"Report: {page}", markup=False)
    console.print(f"Pictures: {', '.join(each.name for each in pictures) or 'none'}", markup=False)


def _figures(profile: FlowProfile, validation: Validation) -> dict[str, Figure]:
    psi, errors = _statistic(profile, "psi"), _statistic(profile, "psi_stderr")
    found = {}
    if psi:
        found["sensitivity"] = report_figures.sensitivity_map(psi, errors)
        found["layer_types"] = report_figures.layer_types(psi, label="ψ", reference=0.5)
    if any(len(each) and float(each[0]) > 0 for group in profile.spectra.values() for each in group.values()):
        found["spectra"] = report_figures.spectral_decay(profile)
    if report_figures.rank_kinds(profile):
        found["effective_ranks"] = report_figures.effective_ranks(profile)
    estimators = _estimators(profile)
    if len(estimators) > 1:
        found["estimator_agreement"] = report_figures.estimator_agreement(estimators)
    correlations = validation.correlations
    rows = {name: correlations[name] for name in _by_agreement(list(correlations), validation) if correlations[name]}
    if rows:
        found["ablation_correlations"] = report_figures.ablation_correlations(rows, ABLATIONS)
    if any(name in psi for changes in validation.ablations.values() for name in changes):
        titled = {ABLATIONS[key]: changes for key, changes in validation.ablations.items()}
        found["ablation_scatter"] = report_figures.ablation_scatter(psi, errors, titled)
    return found


def _statistic(profile: FlowProfile, key: str) -> dict[str, float]:
    return {name: float(each.statistics[key]) for name, each in profile.modules.items() if key in each.statistics}


def _estimators(profile: FlowProfile) -> dict[str, dict[str, float]]:
    """Return ψ by estimator and module, from the statistics ``psi_<estimator>``."""
    keys = dict.fromkeys(key for each in profile.modules.values() for key in each.statistics)
    names = [key.removeprefix("psi_") for key in keys if key.startswith("psi_") and not key.endswith("_stderr")]
    return {name: _statistic(profile, f"psi_{name}") for name in names}


# the page


def _page(profile: FlowProfile, validation: Validation, figures: Mapping[str, Figure], refinement: str) -> str:
    pictures = {name: picture(name, figure, CAPTIONS[name]) for name, figure in figures.items()}
    sections = [
        ("seen", "What one sees", _seen(profile, validation)),
        ("sensitivity", "Sensitivity by place", _joined(pictures, "sensitivity")),
        ("types", "Types of layers", _joined(pictures, "layer_types") + _type_table(profile)),
        ("spectra", "Spectra", _joined(pictures, "spectra")),
        ("ranks", "Effective ranks", _joined(pictures, "effective_ranks") + _rank_table(profile)),
        ("estimators", "Estimators", _estimator_table(profile, validation) + _joined(pictures, "estimator_agreement")),
        ("ablations", "Against ablations", _joined(pictures, "ablation_correlations", "ablation_scatter")),
        ("refinement", "Refinement", refinement),
        ("modules", "All modules", _module_table(profile)),
        ("provenance", "Provenance", _provenance_table(profile)),
    ]
    sections = [each for each in sections if each[2]]
    contents = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections)
    model = printable(str(profile.provenance.get("model", "a model")))
    style = files("flowra_pipelines").joinpath("report_style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Flow profile of {escape(model)}</title><style>{style}</style></head><body>"
        f'<div class="layout"><header><p class="overline">Flow profile</p><h1>{escape(model)}</h1>'
        f'<p class="soft">Where information flows in this model, and where rank is worth its parameters.</p>'
        f"{_numbers(profile)}</header>"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>{body}</main></div></body></html>\n'
    )


def _numbers(profile: FlowProfile) -> str:
    """Show the sizes that everything else refers to."""
    blocks = {block for block, _ in map(layer_and_kind, profile.modules) if block is not None}
    cost = sum(each.cost_per_rank for each in profile.modules.values())
    shown = {
        "modules": f"{len(profile.modules):,}",
        "blocks": f"{len(blocks):,}" if blocks else None,
        "examples": _whole(profile.provenance.get("examples")),
        "parameters of the base": _compact(profile.base_parameters),
        "one rank everywhere": f"{100 * cost / profile.base_parameters:.2g} %",
    }
    rows = (f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in shown.items() if value)
    return f'<dl class="numbers">{"".join(rows)}</dl>'


def _seen(profile: FlowProfile, validation: Validation) -> str:
    """Say in words what the pictures show."""
    said = [*_of_sensitivity(profile), *_of_ranks(profile), *_of_estimators(profile, validation)]
    psi = _statistic(profile, "psi")
    if not psi:
        said.insert(0, "The profile holds no sensitivity ψ.")
    words = "".join(f"<li>{escape(line)}</li>" for line in said)
    meaning = (
        "ψ compares what the first unit of rank gains in a module, per parameter, with the median module: ½ is the"
        " median, 0.9 is nine times its gain, 0 is none."
    )
    return (f'<p class="soft">{meaning}</p>' if psi else "") + f"<ul>{words}</ul>"


def _of_sensitivity(profile: FlowProfile) -> list[str]:
    psi, errors = _statistic(profile, "psi"), _statistic(profile, "psi_stderr")
    if not psi:
        return []
    said = []
    types = {kind: each for kind, each in summarise(profile, "psi").items() if kind != "other"}
    if len(types) > 1:
        order = sorted(types, key=lambda kind: -types[kind].mean)
        first, second, last = order[0], order[1], order[-1]
        line = f"Most sensitive on average: {first} (mean ψ {types[first].mean:.2f})"
        line += f", then {second} ({types[second].mean:.2f})" if len(order) > 2 else ""
        said.append(f"{line}. Least: {last} ({types[last].mean:.2f}).")
    top = sorted(psi, key=lambda name: -psi[name])[:SHOWN]
    named = "; ".join(f"{printable(name)} ({_with_error(psi[name], errors.get(name))})" for name in top)
    said.append(f"The highest single modules: {named}.")
    if any(errors.values()):
        told = [psi[name] for name in psi if not report_figures.uncertain(psi[name], errors.get(name))]
        above, below = sum(value > 0.5 for value in told), sum(value < 0.5 for value in told)
        said.append(
            f"Of {len(psi)} modules, {above} lie clearly above the median, {below} clearly below it, and"
            f" {len(psi) - above - below} cannot be told from it with these examples."
        )
    else:
        said.append("No standard errors are known, so small differences of ψ may be chance.")
    by_block = [(float(block), psi[name]) for name in psi if (block := layer_and_kind(name)[0]) is not None]
    trend = rank_correlation(*zip(*by_block, strict=True)) if by_block else None
    if trend is not None and len({block for block, _ in by_block}) > 2:
        how = "rises with" if trend > 0.3 else "falls with" if trend < -0.3 else "hardly depends on"
        said.append(f"ψ {how} depth (rank correlation {trend:.2f}).")
    return said


def _of_ranks(profile: FlowProfile) -> list[str]:
    said = []
    weights = [
        each.statistics["weight_effective_rank"] / min(each.shape)
        for each in profile.modules.values()
        if "weight_effective_rank" in each.statistics
    ]
    if weights:
        said.append(
            f"The median weight uses {100 * median(weights):.0f} % of its directions (effective rank over full rank)."
        )
    for kind, what in (
        ("gradient", "Mean gradients"),
        ("update", "Learned updates"),
        ("activation", "Inputs of layers"),
    ):
        ranks = list(_statistic(profile, f"{kind}_effective_rank").values())
        if ranks:
            said.append(
                f"{what} have effective rank {_digits(median(ranks))} in the median module (from"
                f" {_digits(min(ranks))} to {_digits(max(ranks))})."
            )
    return said


def _of_estimators(profile: FlowProfile, validation: Validation) -> list[str]:
    said = []
    estimators = _estimators(profile)
    pairs = [
        (rho, first, second)
        for index, first in enumerate(estimators)
        for second in list(estimators)[index + 1 :]
        if (rho := _agreement(estimators[first], estimators[second])) is not None
    ]
    if pairs:
        best, worst = max(pairs), min(pairs)
        line = f"{printable(best[1])} and {printable(best[2])} rank modules most alike (ρ\u00a0=\u00a0{best[0]:.2f})"
        if len(pairs) > 1:
            line += f"; {printable(worst[1])} and {printable(worst[2])} least (ρ\u00a0=\u00a0{worst[0]:.2f})"
        said.append(f"{line}.")
    for key, title in ABLATIONS.items():
        found = {name: each[key] for name, each in validation.correlations.items() if key in each}
        if found:
            best_name = max(found, key=lambda name: found[name][0])
            value, low, high = found[best_name]
            known = validation.reliability.get(key)
            itself = "" if known is None else f"; the ablation with itself: {known:.2f}"
            said.append(
                f"With the ablation “{title}”, {printable(best_name)} agrees best (ρ\u00a0=\u00a0{value:.2f},"
                f" {low:.2f} to {high:.2f}{itself})."
            )
    return said


def _type_table(profile: FlowProfile) -> str:
    if not _statistic(profile, "psi"):
        return ""
    rows = [
        [kind, str(each.count), f"{each.mean:.3f}", f"{each.spread:.3f}", _percent(each.share)]
        for kind, each in summarise(profile, "psi").items()
    ]
    return table(["type", "modules", "mean ψ", "spread", "share of the sum"], rows)


def _rank_table(profile: FlowProfile) -> str:
    kinds = report_figures.rank_kinds(profile)
    if not kinds:
        return ""
    by_kind = {kind: summarise(profile, f"{kind}_effective_rank") for kind in kinds}
    stable = {
        kind: summarise(profile, f"{kind}_stable_rank") for kind in kinds if _statistic(profile, f"{kind}_stable_rank")
    }
    rows = []
    for name in dict.fromkeys(name for found in by_kind.values() for name in found):
        cells = []
        for kind in kinds:
            whole, part = by_kind[kind].get(name), stable.get(kind, {}).get(name)
            text = "–" if whole is None else _digits(whole.mean)
            cells.append(text if part is None else f"{text} / {_digits(part.mean)}")
        rows.append([name, *cells])
    titles = [report_figures.TITLES.get(kind, printable(kind)) for kind in kinds]
    note = '<p class="soft">Mean effective rank by type of layer; after the stroke the stable rank Σσ²/σ₁².</p>'
    return note + table(["type", *titles], rows)


def _estimator_table(profile: FlowProfile, validation: Validation) -> str:
    estimators, psi = _estimators(profile), _statistic(profile, "psi")
    names = _by_agreement(list(dict.fromkeys([*estimators, *validation.correlations])), validation)
    if not names:
        return ""
    ablations = [key for key in ABLATIONS if any(key in each for each in validation.correlations.values())]
    rows = []
    for name in names:
        own = estimators.get(name, {})
        rho = _agreement(own, psi)
        errors = list(_statistic(profile, f"psi_{name}_stderr").values())
        cost = validation.costs.get(name)
        found = validation.correlations.get(name, {})
        intervals = [
            f"{found[key][0]:.2f} ({found[key][1]:.2f} – {found[key][2]:.2f})" if key in found else "–"
            for key in ablations
        ]
        shown = ["–" if rho is None else f"{rho:.2f}", f"{median(errors):.3f}" if errors else "–"]
        rows.append([printable(name), *shown, "–" if cost is None else f"{cost:.3g}", *intervals])
    headings = [
        "estimator",
        "ρ with ψ",
        "median error of ψ",
        "cost",
        *(f"ρ with “{ABLATIONS[key]}”" for key in ablations),
    ]
    note = (
        '<p class="soft">ρ is Spearman\'s rank correlation over modules. Units of estimators differ, so only the order'
        " that they put modules in compares. Cost: in passes over the examples, forward and backward.</p>"
    )
    return note + table(headings, rows)


def _module_table(profile: FlowProfile) -> str:
    psi, errors = _statistic(profile, "psi"), _statistic(profile, "psi_stderr")
    ranks = _statistic(profile, "weight_effective_rank")
    rows = [
        [
            printable(name),
            layer_type(name),
            f"{each.shape[0]:,} × {each.shape[1]:,}",
            f"{each.cost_per_rank:,}",
            _with_error(psi[name], errors.get(name)) if name in psi else "–",
            f"{ranks[name]:.1f}" if name in ranks else "–",
        ]
        for name, each in sorted(profile.modules.items(), key=lambda each: -psi.get(each[0], 0.0))
    ]
    headings = ["module", "type", "shape", "cost of a rank", "ψ", "effective rank of the weight"]
    return (
        f"<details><summary>{len(rows):,} modules, the most sensitive first</summary>{table(headings, rows)}</details>"
    )


def _provenance_table(profile: FlowProfile) -> str:
    rows = [[printable(key), printable(str(value))] for key, value in sorted(profile.provenance.items())]
    return table(["", "value"], rows, wrap=True) if rows else "<p>The profile does not say where it comes from.</p>"


def _joined(pictures: Mapping[str, str], *names: str) -> str:
    return "".join(pictures.get(name, "") for name in names)


# numbers in words


def _by_agreement(names: Sequence[str], validation: Validation) -> list[str]:
    """Put estimators in the order of their agreement with the first ablation that was made; the rest follow."""
    found = validation.correlations
    for key in ABLATIONS:
        known = sorted((name for name in names if key in found.get(name, {})), key=lambda name: -found[name][key][0])
        if known:
            return [*known, *(name for name in names if name not in known)]
    return list(names)


def _agreement(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    shared = [name for name in first if name in second]
    return rank_correlation([first[name] for name in shared], [second[name] for name in shared])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}\u00a0±\u00a0{error:.3f}" if error else f"{value:.3f}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _whole(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _compact(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
