import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowra_analysis import FlowProfile, ModuleProfile, provenance_of, read_profile, write_profile


def profile() -> FlowProfile:
    return FlowProfile(
        modules={
            "encoder.layer.0.query": ModuleProfile(
                shape=(4, 3), cost_per_rank=7, statistics={"fisher_trace": 0.25, "fisher_trace_stderr": 1e-30}
            ),
            "head/é": ModuleProfile(shape=(2, 4), cost_per_rank=6),
        },
        spectra={
            "flow_gains": {"head/é": torch.tensor([1.0, 0.1])},
            "weight": {
                "encoder.layer.0.query": torch.tensor([3.0, 3.0, 0.0], dtype=torch.float64),
                "head/é": torch.tensor([2.0, 1.0], dtype=torch.bfloat16),
            },
        },
        base_parameters=20,
        blocks={"encoder.layer.0": {"jacobian_gain": 1.5}},
        provenance={"model": "tiny", "num_examples": 128, "seconds": 0.5},
    )


def assert_same(a: FlowProfile, b: FlowProfile) -> None:
    assert (a.modules, a.blocks, a.base_parameters, a.provenance) == (
        b.modules,
        b.blocks,
        b.base_parameters,
        b.provenance,
    )
    assert {kind: set(group) for kind, group in a.spectra.items()} == {
        kind: set(group) for kind, group in b.spectra.items()
    }
    for kind, group in a.spectra.items():
        for name, spectrum in group.items():
            assert spectrum.dtype == b.spectra[kind][name].dtype
            assert torch.equal(spectrum, b.spectra[kind][name])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_profile_survives_the_round_trip(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "new" / "folder")
    assert_same(read_profile(tmp_path / "new" / "folder"), profile())


def test_profile_without_spectra_survives_the_round_trip(tmp_path: Path) -> None:
    bare = replace(profile(), spectra={}, provenance={})
    write_profile(bare, tmp_path)
    assert_same(read_profile(str(tmp_path)), bare)


def test_equal_values_give_equal_bytes_and_leave_nothing_else(tmp_path: Path) -> None:
    one = profile()
    other = replace(
        one,
        modules={
            name: replace(module, statistics=dict(reversed(module.statistics.items())))
            for name, module in reversed(one.modules.items())
        },
        spectra={kind: dict(reversed(group.items())) for kind, group in reversed(one.spectra.items())},
        provenance=dict(reversed(one.provenance.items())),
    )
    write_profile(one, tmp_path / "one")
    write_profile(other, tmp_path / "other")
    write_profile(read_profile(tmp_path / "one"), tmp_path / "again")
    assert content(tmp_path / "one").keys() == {"profile.json", "profile.safetensors"}
    assert content(tmp_path / "one") == content(tmp_path / "other") == content(tmp_path / "again")


def test_whole_statistics_are_written_as_the_floats_they_equal(tmp_path: Path) -> None:
    for name, value in (("int", 3), ("float", 3.0)):
        module = ModuleProfile(shape=(2, 2), cost_per_rank=4, statistics={"psi": value})
        write_profile(FlowProfile(modules={"a": module}, base_parameters=4), tmp_path / name)
    assert content(tmp_path / "int") == content(tmp_path / "float")


def test_spectra_may_share_and_slice_memory(tmp_path: Path) -> None:
    sigma = torch.tensor([3.0, 9.0, 2.0, 9.0, 1.0])[::2]
    shared = replace(profile(), spectra={"a": {"head/é": sigma}, "b": {"head/é": sigma}})
    write_profile(shared, tmp_path)
    assert_same(read_profile(tmp_path), shared)


def test_rewriting_replaces_both_files(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path)
    write_profile(replace(profile(), base_parameters=21, spectra={}), tmp_path)
    assert read_profile(tmp_path).base_parameters == 21
    assert read_profile(tmp_path).spectra == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {}}, "modules must hold at least one module, got none"),
        ({"base_parameters": 0}, "base_parameters must be a whole number ≥ 1, got 0"),
        ({"base_parameters": True}, "base_parameters must be a whole number ≥ 1, got True"),
        ({"provenance": {"seconds": float("inf")}}, "provenance must be names and strings or finite numbers"),
        ({"provenance": {"labels": None}}, "provenance must be names and strings or finite numbers"),
        ({"spectra": {"a/b": {}}}, "kinds of spectra must be names without '/', got 'a/b'"),
        ({"spectra": {"weight": {"gone": torch.ones(1)}}}, r"got 'weight' for \['gone'\]"),
    ],
)
def test_profile_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(profile(), **change)


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (torch.ones(2, 2), "spectra must be 1-D and of 16, 32 or 64 bits"),
        (torch.ones(2, dtype=torch.int64), "spectra must be 1-D and of 16, 32 or 64 bits, got torch.int64"),
        (
            torch.ones(2).to(torch.float8_e4m3fn),
            "spectra must be 1-D and of 16, 32 or 64 bits, got torch.float8_e4m3fn",
        ),
        (torch.tensor([1.0, -1.0]), "spectra must be ≥ 0, got -1.0: 'weight' of 'head/é'"),
        (torch.tensor([1.0, torch.nan]), "spectra must be finite"),
        (torch.tensor([1.0, 2.0]), "spectra must be non-increasing, got an increase: 'weight' of 'head/é'"),
    ],
)
def test_tensor_that_is_no_spectrum_is_refused_in_memory_and_in_files(
    spectrum: Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(profile(), spectra={"weight": {"head/é": spectrum}})
    write_profile(profile(), tmp_path)
    save_file({"weight/head/é": spectrum}, tmp_path / "profile.safetensors")
    with pytest.raises(ValueError, match=message):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2, 0)}, r"shape must be two whole numbers ≥ 1, got \(2, 0\)"),
        ({"shape": (2, 3, 4)}, "shape must be two whole numbers ≥ 1"),
        ({"cost_per_rank": 1.5}, "cost_per_rank must be a whole number ≥ 1, got 1.5"),
        ({"statistics": {"psi": float("nan")}}, "statistics must be names and finite numbers, got 'psi': nan"),
        ({"statistics": {"psi": "0.5"}}, "statistics must be names and finite numbers, got 'psi': '0.5'"),
        ({"statistics": {1: 0.5}}, "statistics must be names and finite numbers, got 1: 0.5"),
        ({"statistics": {"psi_stderr": -1.0}}, "statistics must be standard errors ≥ 0, got 'psi_stderr': -1.0"),
    ],
)
def test_module_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleProfile(**{"shape": (2, 3), "cost_per_rank": 5, **change})


WHOLE = {
    "format_version": "2",
    "base_parameters": "20",
    "modules": '{"a": {"shape": [2, 3], "cost_per_rank": 5, "statistics": {}}}',
    "blocks": "{}",
    "provenance": "{}",
}


def refusal(text: str, folder: Path) -> str:
    """Return what the reader says of this JSON text beside good tensors."""
    write_profile(replace(profile(), spectra={}), folder)
    (folder / "profile.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        read_profile(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON, got"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 100_000, "must be JSON, got"),
        ("\xff", "must be JSON, got"),
        ("{}", "format_version must be 2, got None"),
        ('{"format_version": 2, "format_version": 2}', "must be JSON, got a key twice"),
        ('{"format_version": 2, "moduels": {}}', "and unknown ['moduels']"),
    ],
    ids=["empty", "list", "deep", "not utf-8", "no version", "key twice", "unknown key"],
)
def test_damaged_json_is_refused_with_one_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", "1", "format_version must be 2, got 1"),
        ("format_version", "true", "format_version must be 2, got True"),
        ("format_version", f'"{"1" * 5000}"', "format_version must be 2, got '1111"),
        ("base_parameters", '"20"', "base_parameters must be a whole number ≥ 1, got '20'"),
        ("base_parameters", "1" + "0" * 30, "base_parameters must be a whole number ≥ 1, got 1000"),
        ("base_parameters", "1" + "0" * 5000, "must be JSON, got"),
        ("provenance", '{"nested": {}}', "provenance must be names and strings or finite numbers"),
        ("blocks", "[]", "blocks must be a JSON object, got list"),
        ("blocks", '{"h.0": 3}', "blocks must be JSON objects, got int for block 'h.0'"),
        ("blocks", '{"h.0": {"gain": "3"}}', "blocks must have names and finite numbers, got 'gain': '3' for 'h.0'"),
        ("modules", "[]", "modules must be a JSON object, got list"),
        ("modules", '{"a": 3}', "modules must be JSON objects, got int for module 'a'"),
        ("modules", '{"a": {"shape": [2, 3]}}', "missing ['cost_per_rank', 'statistics'] and unknown []"),
        ("modules", '{"a": {"shape": "23", "cost_per_rank": 5, "statistics": {}}}', "got '23'; for module 'a'"),
        ("modules", '{"a": {"shape": [2, 3], "cost_per_rank": 5, "statistics": []}}', "statistics must be a JSON obj"),
        ("modules", '{"a": {"shape": [2, 3], "cost_per_rank": 5, "statistics": {"psi": NaN}}}', "'psi': nan"),
        ("modules", '{"a": {"shape": [2, 3], "cost_per_rank": 5, "statistics": {"psi": 1e999}}}', "'psi': inf"),
        ("modules", '{"a": {"shape": [2, 3], "cost_per_rank": 5, "statistics": {}, "rank": 1}}', "unknown ['rank']"),
    ],
    ids=[*"abcdefghijklmnopqr"],
)
def test_hostile_value_is_refused_with_one_line(key: str, value: str, message: str, tmp_path: Path) -> None:
    entries = ", ".join(f'"{each}": {text}' for each, text in {**WHOLE, key: value}.items())
    assert message in refusal(f"{{{entries}}}", tmp_path)


def test_the_whole_file_those_tests_start_from_is_read(tmp_path: Path) -> None:
    write_profile(replace(profile(), spectra={}), tmp_path)
    (tmp_path / "profile.json").write_text("{" + ", ".join(f'"{key}": {text}' for key, text in WHOLE.items()) + "}")
    assert read_profile(tmp_path).modules == {"a": ModuleProfile(shape=(2, 3), cost_per_rank=5)}


def test_oversized_json_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(profile(), tmp_path)
    monkeypatch.setattr("flowra_analysis.flow_profile.MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match=r"profile\.json must be at most 10 bytes, got"):
        read_profile(tmp_path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile must be a folder with profile\.json"):
        read_profile(tmp_path)
    write_profile(profile(), tmp_path)
    (tmp_path / "profile.safetensors").unlink()
    with pytest.raises(ValueError, match=r"profile must hold profile\.safetensors, got none"):
        read_profile(tmp_path)


def test_truncated_tensors_are_refused(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path)
    path = tmp_path / "profile.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [("weight", "tensor names must be '<kind>/<module name>'"), ("weight/gone", r"got 'weight' for \['gone'\]; in")],
)
def test_tensor_without_a_place_is_refused(key: str, message: str, tmp_path: Path) -> None:
    write_profile(profile(), tmp_path)
    save_file({key: torch.ones(2)}, tmp_path / "profile.safetensors")
    with pytest.raises(ValueError, match=message):
        read_profile(tmp_path)


def test_a_profile_with_hashes_and_several_estimators_is_of_the_same_version(tmp_path: Path) -> None:
    module = ModuleProfile(
        shape=(2, 3),
        cost_per_rank=5,
        statistics={"psi": 0.5, "psi_stderr": 0.1, "psi_fisher": 0.4, "psi_fisher_stderr": 0.1, "gain_fisher": 1e-9},
    )
    origin = provenance_of(base="b" * 64, data="d" * 64, seed=0, examples=128, estimators=["empirical Fisher"])
    rich = FlowProfile(
        modules={"a": module}, spectra={"update": {"a": torch.ones(2)}}, base_parameters=6, provenance=origin
    )
    write_profile(rich, tmp_path)
    assert '"format_version": 2' in (tmp_path / "profile.json").read_text(encoding="utf-8")
    assert_same(read_profile(tmp_path), rich)
