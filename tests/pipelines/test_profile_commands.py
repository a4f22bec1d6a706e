"""`flowra profile`: what is printed is what the profiles say, and a mistake is one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowra_analysis import FlowProfile, ModuleProfile, write_profile
from flowra_pipelines.errors import UserError
from flowra_pipelines.profile_commands import find_profile, printable

Run = Callable[..., tuple[int, str, str]]
NAMES = {f"h.{block}.{name}": block + index for block in (2, 10) for index, name in enumerate(("q_proj", "fc2"))}


def profile(*, factor: float = 1.0, **provenance: str | int) -> FlowProfile:
    return FlowProfile(
        modules={
            name: ModuleProfile(
                shape=(4, 3),
                cost_per_rank=7,
                statistics={"psi": factor * value / 20, "psi_stderr": 0.05, "gain": value},
            )
            for name, value in NAMES.items()
        },
        spectra={"weight": {"h.2.fc2": torch.tensor([factor, 0.5])}},
        base_parameters=1000,
        provenance={"model": "m", **provenance},
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A run's folder and a folder with a profile, of other data."""
    write_profile(profile(base_hash="b", data_hash="d", seed=0), tmp_path / "run" / "calibrate")
    write_profile(profile(factor=2.0, base_hash="b", data_hash="e", seed=0), tmp_path / "other")
    return tmp_path / "run", tmp_path / "other"


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_the_profile_is_found_in_a_run_in_its_stage_and_by_its_file(pair: tuple[Path, Path]) -> None:
    stage = pair[0] / "calibrate"
    assert {find_profile(path) for path in (pair[0], stage, stage / "profile.json")} == {stage}
    for path in (pair[0].parent, stage / "profile.safetensors", stage / "none"):
        with pytest.raises(UserError, match=r"profile must be a profile\.json, a folder with one, or a run's folder"):
            find_profile(path)


def test_show_lists_modules_block_by_block_and_types_of_layers(pair: tuple[Path, Path], here: Run) -> None:
    code, shown, _ = here("profile", "show", pair[0])
    assert code == 0
    rows = lines(shown)
    assert [row[0] for row in rows[:4]] == ["h.2.fc2", "h.2.q_proj", "h.10.fc2", "h.10.q_proj"]
    assert rows[0] == ["h.2.fc2", "down", "4 × 3", "7", "0.150 ± 0.050", "–"]
    assert rows[4] == ["Q", "2", "0.300", "0.20", "46.2%"]
    assert "seed: 0" in shown


def test_show_of_a_profile_that_says_nothing_lists_its_modules(tmp_path: Path, here: Run) -> None:
    write_profile(FlowProfile(modules={"a": ModuleProfile(shape=(2, 1), cost_per_rank=3)}, base_parameters=2), tmp_path)
    code, shown, _ = here("profile", "show", tmp_path)
    assert code == 0
    assert lines(shown) == [["a", "other", "2 × 1", "3", "–", "–"]]


def test_diff_warns_of_other_data_and_shows_the_largest_changes(pair: tuple[Path, Path], here: Run) -> None:
    code, shown, _ = here("profile", "diff", *pair, "--top", "1")
    assert code == 0
    assert "Warning: The data differ (`data_hash`)" in shown
    assert "bases" not in shown
    rows = lines(shown)
    assert ["data_hash", "d", "e"] in rows
    assert ["psi", "1.000", "h.10.fc2", "0.55", "1.1", "+0.55", "7.8"] in rows
    assert ["gain", "1.000", "the same for 4 modules", "", "", "", ""] in rows
    assert ["weight", "1", "0.49", "0.49", "h.2.fc2"] in rows
    assert "h.2.q_proj" not in shown


def test_a_difference_is_no_error_and_neither_is_none(pair: tuple[Path, Path], here: Run) -> None:
    code, shown, complaint = here("profile", "diff", pair[0], pair[0])
    assert (code, complaint) == (0, "")
    assert "Provenance: the same." in shown
    assert "Warning" not in shown


def test_json_is_the_whole_difference(pair: tuple[Path, Path], here: Run) -> None:
    code, shown, _ = here("profile", "diff", *pair, "--json", "--top", "1")
    assert code == 0
    found = json.loads(shown)
    assert (found["same_base"], found["same_data"]) == (True, False)
    assert found["provenance"] == {"data_hash": ["d", "e"]}
    assert [each["module"] for each in found["statistics"]["psi"]["changes"]] == sorted(NAMES, key=lambda n: -NAMES[n])
    assert found["statistics"]["gain"]["rank_correlation"] == 1
    assert len(found["warnings"]) == 1


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"provenance": {"base_hash": "x", "data_hash": "d"}}, "The bases differ (`base_hash`)"),
        ({"provenance": {"data_hash": "d"}}, "Whether the bases are the same is not known"),
        ({"modules": {"a": ModuleProfile(shape=(2, 1), cost_per_rank=3)}, "spectra": {}}, "The modules differ"),
        ({"modules": {**profile().modules, "h.2.fc2": ModuleProfile(shape=(2, 1), cost_per_rank=3)}}, "of h.2.fc2"),
    ],
)
def test_what_is_not_like_with_like_is_said(
    change: dict[str, object], warning: str, pair: tuple[Path, Path], here: Run
) -> None:
    write_profile(replace(profile(base_hash="b", data_hash="d"), **change), pair[1])  # type: ignore[arg-type]
    code, shown, _ = here("profile", "diff", *pair)
    assert code == 0
    assert warning in shown


def test_modules_statistics_and_spectra_of_one_side_only_are_named(pair: tuple[Path, Path], here: Run) -> None:
    other = profile(base_hash="b", data_hash="d")
    modules = {name: replace(each, statistics={"psi": 0.5}) for name, each in list(other.modules.items())[1:]}
    write_profile(replace(other, modules=modules, spectra={"update": {"h.2.fc2": torch.ones(1)}}), pair[1])
    _, shown, _ = here("profile", "diff", *pair)
    for line in ("Modules only in A: h.2.q_proj", "Statistics only in A: gain", "Spectra only in B: update"):
        assert line in shown


@pytest.mark.parametrize(
    "damage",
    ["", "[]", '{"format_version": 2}', '{"format_version": 1, "modules": {"a\\nb": {}}}', "\x00"],
    ids=["empty", "list", "keys", "version", "null"],
)
@pytest.mark.parametrize("command", [["profile", "show"], ["profile", "diff", "{good}"], ["report"]], ids=" ".join)
def test_a_damaged_profile_is_one_line_and_exit_code_2(
    command: list[str], damage: str, pair: tuple[Path, Path], here: Run
) -> None:
    (pair[1] / "profile.json").write_text(damage)
    code, shown, complaint = here(*(each.format(good=pair[0]) for each in command), pair[1])
    assert code == 2
    assert shown == ""
    assert complaint.startswith("flowra: ")
    assert complaint.count("\n") == 1


def test_a_folder_without_a_profile_is_one_line_and_exit_code_2(tmp_path: Path, here: Run) -> None:
    for command in (["profile", "show"], ["profile", "diff", tmp_path], ["report"]):
        code, _, complaint = here(*command, tmp_path / "none")
        assert code == 2
        assert complaint.startswith("flowra: profile must be a profile.json")
        assert complaint.count("\n") == 1


def test_names_that_would_draw_on_the_terminal_are_written_as_escapes(tmp_path: Path, here: Run) -> None:
    hostile = "a.\x1b[2J[red]\u202e\ud800\n.q"
    module = ModuleProfile(shape=(2, 1), cost_per_rank=3, statistics={"psi": 0.5})
    content = {"model": "[bold]\x1b]0;title\x07"}
    write_profile(FlowProfile(modules={hostile: module}, base_parameters=2, provenance=content), tmp_path)
    for command in (["show", tmp_path], ["diff", tmp_path, tmp_path]):
        code, shown, _ = here("profile", *command)
        assert code == 0
        assert not {"\x1b", "\u202e", "\ud800", "\x07"} & set(shown)
    _, shown, _ = here("profile", "show", tmp_path)
    assert "a.\\x1b[2J[red]\\u202e\\ud800\\n.q" in shown
    assert "[bold]" in shown


def test_a_long_name_is_cut() -> None:
    assert len(printable("a" * 10**7)) == 120
    assert printable("head/é ψ") == "head/é ψ"


@pytest.mark.parametrize("command", [["profile", "--help"], ["profile", "diff", "--help"], ["report", "--help"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys\nfrom flowra_pipelines.cli import main\ntry:\n    main()\nexcept SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
