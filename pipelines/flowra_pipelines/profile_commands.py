"""``flowra profile``: what a profile says, and what differs between two. Imports nothing heavy before it must."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from flowra_pipelines.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from flowra_analysis import FlowProfile, ProfileDiff

__all__ = ["app", "diff_warnings", "find_profile", "natural", "printable", "read_profile_at"]

app = typer.Typer(name="profile", help="Show a profile, or what differs between two.", no_args_is_help=True)

NAME = "profile.json"
PLACES = ("", "calibrate")
"""Where under a folder the profile is."""
SHOWN = 8
"""Names in a line before the rest is counted."""
NUMBER = re.compile(r"\d{1,9}", re.ASCII)
LONGEST = 120
"""Characters of a name or a value."""

ProfilePath = Annotated[
    Path, typer.Argument(help="Folder of a run or of its stage calibrate, or a profile.json.", show_default=False)
]


@app.command()
def show(path: ProfilePath) -> None:
    """Print what a profile says of each module, and of each type of layer."""
    from flowra_pipelines.progress import console

    folder = find_profile(path)
    profile = read_profile_at(folder)
    console.print(_modules(profile, str(folder)), soft_wrap=False)
    by_type = _types(profile)
    if by_type is not None:
        console.print(by_type, soft_wrap=False)
    for key, value in sorted(profile.provenance.items()):
        console.print(f"{printable(key)}: {printable(str(value))}", markup=False, emoji=False)


@app.command()
def diff(
    first: ProfilePath,
    second: ProfilePath,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: everything, not only the largest.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Changes shown of each statistic.")] = 3,
) -> None:
    """Say what differs between two profiles: provenance, modules, ranking, largest changes, spectra."""
    folders = [find_profile(path) for path in (first, second)]
    profiles = [read_profile_at(folder) for folder in folders]
    from flowra_analysis import diff_profiles

    found = diff_profiles(*profiles)
    if as_json:
        content = {"first": str(folders[0]), "second": str(folders[1]), "warnings": diff_warnings(found)}
        typer.echo(json.dumps({**content, **asdict(found)}, indent=2, allow_nan=False))
        return
    _print_diff(found, folders, top)


def find_profile(path: Path) -> Path:
    """Find the profile that is meant: that of a run's folder, of a folder that holds one, or the file itself.

    Returns:
        The folder with ``profile.json``.

    Raises:
        UserError: if there is none.
    """
    if path.name == NAME and path.is_file():
        return path.parent
    for place in PLACES:
        if (path / place / NAME).is_file():
            return path / place
    raise UserError(
        f"profile must be a {NAME}, a folder with one, or a run's folder with the stage calibrate, got {path}"
    )


def read_profile_at(folder: Path) -> "FlowProfile":
    """Read a profile; what is wrong with it is the user's to know.

    Returns:
        The profile.

    Raises:
        UserError: if it cannot be read.
    """
    from flowra_analysis import read_profile

    try:
        return read_profile(folder)
    except OSError as error:
        raise UserError(f"profile must be readable, got {error.strerror} for {folder}") from None
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def printable(text: str) -> str:
    """Write what does not print (control characters, marks that turn the direction of writing) as escapes; cut it."""
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text[: LONGEST + 1]
    )
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def diff_warnings(found: "ProfileDiff") -> list[str]:
    """Say what keeps two profiles from being compared like with like.

    Returns:
        Sentences; none if base and data are known to be the same, and modules and shapes, too.
    """
    warnings = []
    for same, what, key in ((found.same_base, "bases", "base_hash"), (found.same_data, "data", "data_hash")):
        if same is None:
            warnings.append(f"Whether the {what} are the same is not known: a profile without `{key}` does not say.")
        elif not same:
            warnings.append(f"The {what} differ (`{key}`): what changed is due to that, too.")
    if found.only_in_first or found.only_in_second:
        warnings.append("The modules differ: statistics are compared where both profiles have them.")
    if found.other_shapes:
        warnings.append(f"Shape or cost differ of {_listed(found.other_shapes)}.")
    return warnings


def _modules(profile: "FlowProfile", title: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from flowra_analysis import layer_type

    table = Table(title=Text(printable(title)), title_justify="left")
    for heading in ("module", "type", "shape", "cost", "ψ", "effective rank"):
        table.add_column(heading, justify="left" if heading in ("module", "type") else "right", overflow="fold")
    for name, module in sorted(profile.modules.items(), key=lambda each: natural(each[0])):
        known = module.statistics
        rank = known.get("weight_effective_rank")
        table.add_row(
            Text(printable(name)),
            layer_type(name),
            f"{module.shape[0]} × {module.shape[1]}",
            f"{module.cost_per_rank:,}",
            _with_error(known.get("psi"), known.get("psi_stderr")),
            "–" if rank is None else f"{rank:.1f}",
        )
    return table


def _types(profile: "FlowProfile") -> "Table | None":
    """Summarise ψ, or what there is, by the type of layer."""
    from rich.table import Table

    from flowra_analysis import summarise

    known = {key for module in profile.modules.values() for key in module.statistics}
    statistic = next((key for key in ("psi", "fisher_trace", "weight_effective_rank") if key in known), None)
    if statistic is None:
        return None
    name = "ψ" if statistic == "psi" else statistic
    table = Table(title=f"{name} by type of layer", title_justify="left")
    for heading in ("type", "modules", "mean", "spread", "share of the sum"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, found in summarise(profile, statistic).items():
        share = "–" if found.share is None else f"{found.share:.1%}"
        table.add_row(kind, str(found.count), f"{found.mean:#.3g}", f"{found.spread:#.2g}", share)
    return table


def _print_diff(found: "ProfileDiff", folders: Sequence[Path], top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from flowra_pipelines.progress import console

    for label, folder in zip("AB", folders, strict=True):
        console.print(Text.assemble((f"{label}: ", "bold"), str(folder)))
    for line in diff_warnings(found):
        console.print(Text(f"Warning: {line}", "yellow"))
    if found.provenance or found.base_parameters[0] != found.base_parameters[1]:
        table = Table(title="Provenance", title_justify="left")
        for heading in ("", "A", "B"):
            table.add_column(heading, overflow="fold")
        rows = dict(found.provenance)
        if found.base_parameters[0] != found.base_parameters[1]:
            rows["base_parameters"] = found.base_parameters
        for key, values in rows.items():
            table.add_row(*(Text("–" if each is None else printable(str(each))) for each in (key, *values)))
        console.print(table, soft_wrap=False)
    else:
        console.print("Provenance: the same.")
    for label, names in (
        ("Modules", (found.only_in_first, found.only_in_second)),
        ("Statistics", (found.statistics_only_in_first, found.statistics_only_in_second)),
        ("Spectra", (found.spectra_only_in_first, found.spectra_only_in_second)),
    ):
        for side, only in zip("AB", names, strict=True):
            if only:
                console.print(Text(f"{label} only in {side}: {_listed(only)}"))
    if found.statistics:
        console.print(_statistics(found, top), soft_wrap=False)
    if found.spectra:
        table = Table(title="Spectra, ‖A - B‖ / max(‖A‖, ‖B‖)", title_justify="left")
        for heading in ("kind", "modules", "median", "largest", "module"):
            table.add_column(heading, justify="left" if heading in ("kind", "module") else "right", overflow="fold")
        for kind, distances in found.spectra.items():
            if distances:
                name, largest = next(iter(distances.items()))
                middle = median(distances.values())
                cells = (str(len(distances)), f"{middle:.2g}", f"{largest:.2g}")
                table.add_row(Text(printable(kind)), *cells, Text(printable(name)))
        console.print(table, soft_wrap=False)


def _statistics(found: "ProfileDiff", top: int) -> "Table":
    """Show the largest changes of each statistic, ψ first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Statistics: rank correlation ρ (Spearman) over modules, largest changes", title_justify="left")
    for heading in ("statistic", "ρ", "module", "A", "B", "change", "in errors"):
        left = heading in ("statistic", "module")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for key, statistic in sorted(found.statistics.items(), key=lambda each: (not each[0].startswith("psi"), each[0])):
        rho = "–" if statistic.rank_correlation is None else f"{statistic.rank_correlation:.3f}"
        shown = [change for change in statistic.changes[:top] if change.first != change.second]
        for index, change in enumerate(shown):
            table.add_row(
                Text("" if index else printable(key)),
                "" if index else rho,
                Text(printable(change.module)),
                f"{change.first:.4g}",
                f"{change.second:.4g}",
                f"{change.second - change.first:+.2g}",
                "–"
                if change.in_errors is None
                else f"{change.in_errors:.1f}"
                if change.in_errors < 1e4
                else "> 10,000",
                end_section=index == len(shown) - 1,
            )
        if not shown:
            same = f"the same for {len(statistic.changes)} modules"
            table.add_row(Text(printable(key)), rho, same, "", "", "", "", end_section=True)
    return table


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"


def natural(name: str) -> list[tuple[int, str]]:
    """Order names so that block 10 comes after block 9."""
    return [(int(part), "") if NUMBER.fullmatch(part) else (-1, part) for part in name.split(".")]


def _listed(names: Iterable[str]) -> str:
    every = [printable(name) for name in names]
    rest = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
