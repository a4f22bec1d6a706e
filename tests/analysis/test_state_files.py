import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowra_analysis import (
    EKFAC,
    ActivationSpectra,
    DiagonalFisher,
    EmpiricalFisher,
    GradientSpectra,
    MeanGradients,
    Signals,
    read_state,
    state_files,
    write_state,
)
from flowra_analysis.block_jacobians import BlockJacobians, JacobianNorms
from flowra_analysis.empirical_fisher import Moments
from flowra_analysis.kfac import KFAC
from flowra_analysis.state_files import state_from_bytes, state_to_bytes
from flowra_testing.measuring_child import KINDS, assert_same, begin, measured, named

Content = dict[str, object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this process left the states of half the data, and another process those of all of it."""
    folder = tmp_path_factory.mktemp("states")
    model, empty = begin(torch.float32)
    for kind, state in measured(model, empty, slice(3)).items():
        write_state(state, folder / f"{kind}.half")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "flowra_testing.measuring_child", "resume", str(folder)]
    subprocess.run(command, check=True, env=environment)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_equals_what_was_written_to_the_bit(kind: str, folder: Path) -> None:
    model, empty = begin(torch.float32)
    state = measured(model, {kind: empty[kind]}, slice(3))[kind]
    read = read_state(folder / f"{kind}.half", type(state))
    assert_same(named(read), named(state), rtol=0)
    assert state_to_bytes(read) == (folder / f"{kind}.half").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_goes_on_to_the_same_bits_as_one_pass(kind: str, folder: Path) -> None:
    model, empty = begin(torch.float32)
    state = measured(model, {kind: empty[kind]}, slice(None))[kind]
    resumed = read_state(folder / f"{kind}.whole", type(state))
    assert state_to_bytes(named(resumed)) == state_to_bytes(named(state))


def test_jacobians_of_blocks_are_kept(tmp_path: Path) -> None:
    norms = JacobianNorms(*(torch.rand(4, dtype=torch.float64) for _ in range(4)), torch.tensor([3, 10, 4, 2]))
    state = BlockJacobians.init().update("block", norms)
    write_state(state, tmp_path / "state")
    read = read_state(tmp_path / "state", BlockJacobians)
    assert_same(read, state, rtol=0)
    assert read.finalise() == state.finalise()


def spectra(num_modules: int = 3) -> GradientSpectra:
    state = GradientSpectra.init(size=2)
    for module in range(num_modules):
        state = state.update(f"layer.{module}", Signals(torch.randn(2, 3, 40), torch.randn(2, 3, 30)))
    return state


def test_probes_that_modules_share_are_written_once_and_shared_again(tmp_path: Path) -> None:
    write_state(spectra(), tmp_path / "state")
    assert len(load_file(tmp_path / "state")) == 5 + 3 * 4
    probes = [each.probes for each in read_state(tmp_path / "state", GradientSpectra).sketches.values()]
    assert all(a is b for each in probes for a, b in zip(each, probes[0], strict=True))


def test_parts_of_one_tensor_are_written_as_themselves(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = Everything(views=(whole, whole[1], whole.T, whole[1:2, 1:2].expand(5, 2)))
    write_state(state, tmp_path / "state")
    for found, expected in zip(read_state(tmp_path / "state", Everything).views, state.views, strict=True):
        assert torch.equal(found, expected)
        assert found.is_contiguous() or found.stride() == expected.stride()


def test_axes_lie_in_memory_as_they_did(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    write_state(Everything(views=(tensor, torch.eye(3).mT)), tmp_path / "state")
    read = read_state(tmp_path / "state", Everything).views
    assert [each.stride() for each in read] == [(1, 12, 4), (1, 3)]
    assert torch.equal(read[0], tensor)


class Pair(NamedTuple):
    name: str
    value: float | None


@dataclass(frozen=True, eq=False)
class Inner:
    dtype: torch.dtype
    kind: Literal["a", "b", 3]


@dataclass(frozen=True, eq=False)
class Everything:
    """Every type that a field may have."""

    number: int = 2**63 - 1
    third: float = 1 / 3
    whole: float = 2
    is_set: bool = True
    text: str = 'Jalapeño \ud800 \x00 "quoted"'
    pairs: Mapping[str, tuple[Pair, ...]] = ()  # type: ignore[assignment]
    inner: Inner | Pair | None = Inner(torch.bfloat16, 3)
    shape: tuple[int, str] = (4, "x")
    scalar: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.pairs == ():
            object.__setattr__(self, "pairs", {"": (Pair("a", None), Pair("b", -0.0)), "two words": ()})
        if self.number < 0:
            raise ValueError(f"number must be ≥ 0, got {self.number}")


@pytest.mark.parametrize("dtype", state_files.DTYPES.values(), ids=state_files.DTYPES)
def test_every_type_of_field_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = (torch.tensor([0, 1, 3]).to(dtype), torch.zeros(0, 4, dtype=dtype), torch.zeros(4, 0, dtype=dtype))
    for state in (
        Everything(scalar=torch.tensor(1).to(dtype), views=tensors),
        Everything(inner=None, scalar=None),
        Everything(inner=Pair("c", 5e-324)),
    ):
        write_state(state, tmp_path / "state")
        read = read_state(tmp_path / "state", Everything)
        assert_same(read, replace(state, whole=2.0), rtol=0)
        assert state_to_bytes(state_from_bytes(state_to_bytes(state), Everything)) == state_to_bytes(read)


def test_gradients_and_the_places_of_tensors_are_not_kept() -> None:
    made = Everything(scalar=torch.ones(3, requires_grad=True))
    read = state_from_bytes(state_to_bytes(made), Everything)
    assert read.scalar is not None
    assert not read.scalar.requires_grad
    on_meta = state_from_bytes(state_to_bytes(Everything()), Everything, device="meta")
    assert_same(on_meta, Everything(whole=2.0), rtol=0)


def test_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    write_state(Everything(scalar=torch.ones(3)), tmp_path / "state")
    read = read_state(tmp_path / "state", Everything)
    write_state(Everything(scalar=torch.zeros(3)), tmp_path / "state")
    (tmp_path / "state").write_bytes(b"")
    assert read.scalar is not None
    assert read.scalar.tolist() == [1, 1, 1]
    assert read.scalar.data_ptr() % 64 == 0


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(spectra(1), tmp_path / "new" / "state")
    before = (tmp_path / "new" / "state").read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise OSError("no space left")

    monkeypatch.setattr(state_files.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_state(spectra(2), tmp_path / "new" / "state")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]
    assert (tmp_path / "new" / "state").read_bytes() == before


@dataclass(frozen=True)
class Unfit:
    field: object


@dataclass(frozen=True)
class ByNumber:
    field: Mapping[int, int]


@pytest.mark.parametrize(
    ("state", "error", "match"),
    [
        (Everything(third=float("nan")), ValueError, "must be finite, got NaN or infinity"),
        (Everything(third=float("-inf")), ValueError, "must be finite, got NaN or infinity"),
        (Everything(scalar=torch.tensor([1.0, float("inf")])), ValueError, r"NaN or infinity in one of \(2,\)"),
        (Everything(scalar=torch.ones(2, dtype=torch.complex64)), ValueError, "of dtypes .* torch.complex64"),
        (Everything(scalar=torch.eye(2).to_sparse()), ValueError, "must be dense"),
        (Everything(number=2**63), ValueError, r"of 64 bits, got 9223372036854775808; at state\.number"),
        (Everything(number=True), ValueError, r"must be int, got True; at state\.number"),
        (Everything(text=3), ValueError, r"must be str, got 3; at state\.text"),  # type: ignore[arg-type]
        (Everything(inner=Inner(torch.float32, "c")), ValueError, r"got 'c'; at state\.inner\.kind"),  # type: ignore[arg-type]
        ({"a": 1}, TypeError, "state must be a frozen dataclass, got dict"),
        (Unfit(3), TypeError, r"got <class 'object'>; at state\.field"),
        (Unfit({1}), TypeError, r"got set; at state\.field"),
        (ByNumber({1: 2}), TypeError, r"keys of mappings .* at state\.field"),
        (ByNumber({}), TypeError, r"keys of mappings .* at state\.field"),
    ],
    ids=str,
)
def test_what_could_not_be_read_is_not_written(
    state: object, error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        write_state(state, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def changed(path: Path, change: Callable[[Content, dict[str, Tensor]], object]) -> Path:
    """Change the JSON or the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["flowra_state"])
    tensors = load_file(path)
    change(content, tensors)
    save_file(tensors, path, metadata={"flowra_state": json.dumps(content)})
    return path


def at(content: object, *keys: str | int) -> Content:
    for key in keys:
        content = content[key]  # type: ignore[index]
    return content  # type: ignore[return-value]


SKETCH = ("state", "sketches", "layer.0")
SPECTRA: dict[str, tuple[Callable[[Content, dict[str, Tensor]], object], str]] = {
    "version": (lambda c, t: c.update(format_version=2), "format_version must be 1, got 2"),
    "version-true": (lambda c, t: c.update(format_version=True), "format_version must be 1, got True"),
    "class": (lambda c, t: c.update({"class": "KFAC"}), "class must be 'GradientSpectra', got 'KFAC'"),
    "class-list": (lambda c, t: c.update({"class": [1]}), r"class must be 'GradientSpectra', got \[1\]"),
    "top-unknown": (lambda c, t: c.update(more=1), r"unknown \['more'\]; at flowra_state"),
    "top-missing": (lambda c, t: c.pop("state"), r"missing \['state'\]"),
    "unknown": (lambda c, t: at(c, "state").update(more=1), r"unknown \['more'\]; at state"),
    "missing": (
        lambda c, t: at(c, *SKETCH).pop("seed"),
        r"missing \['seed'\] and unknown \[\]; at state\.sketches\['layer\.0'\]",
    ),
    "not-an-object": (lambda c, t: c.update(state=[]), r"must be an object, got \[\]; at state"),
    "not-an-array": (lambda c, t: at(c, *SKETCH).update(shape=30), r"must be an array, got 30; at .*\.shape"),
    "length": (lambda c, t: at(c, *SKETCH).update(shape=[30, 40, 1]), r"must have 2 items, got 3; at .*\.shape"),
    "float": (lambda c, t: at(c, *SKETCH).update(num_examples=2.0), r"must be int, got 2\.0; at .*\.num_examples"),
    "bool": (lambda c, t: at(c, *SKETCH).update(num_examples=True), "must be int, got True"),
    "null": (lambda c, t: at(c, *SKETCH).update(seed=None), r"must be int, got None; at .*\.seed"),
    "large": (lambda c, t: at(c, *SKETCH).update(seed=10**400), r"of 64 bits, got 1000.*; at .*\.seed"),
    "negative": (lambda c, t: at(c, *SKETCH).update(num_examples=-1), "of -1 examples"),
    "size": (lambda c, t: at(c, *SKETCH).update(size=31), r"size must be in \[1, 30\], got 31"),
    "shape": (lambda c, t: at(c, *SKETCH).update(shape=[30, 2**62]), r"tensors must have shapes .*4611686018427387904"),
    "tensor-shape": (
        lambda c, t: t.update({"0": t["0"][:, :-1].clone()}),
        r"tensors must have shapes .* got \[\(2, 29\)",
    ),
    "tensor-dtype": (
        lambda c, t: t.update({"0": t["0"].double()}),
        "torch.float32 or torch.float64, got .*torch.float64",
    ),
    "half": (lambda c, t: t.update({k: each.half() for k, each in t.items()}), "torch.float32 or torch.float64"),
    "whole": (lambda c, t: t.update({k: each.long() for k, each in t.items()}), "torch.float32 or torch.float64"),
    "nan": (lambda c, t: t["3"].view(-1)[5].fill_(torch.nan), r"NaN or infinity in one of \(8, 40\)"),
    "no-tensor": (
        lambda c, t: at(c, *SKETCH, "sums").update(core=1.0),
        r"must be an object, got 1\.0; at .*\.sums\.core",
    ),
    "tensor-number": (lambda c, t: at(c, *SKETCH, "sums").update(core={"tensor": 3}), "must be str, got 3"),
    "axes": (
        lambda c, t: at(c, "axes").update({"0": [1, 1]}),
        r"axes must be those of the tensor, got \[1, 1\] for \(2, 30\)",
    ),
    "axes-text": (lambda c, t: at(c, "axes").update({"0": "10"}), "must be an array, got '10'; at axes"),
    "axes-float": (lambda c, t: at(c, "axes").update({"0": [1.0, 0]}), r"must be int, got 1\.0; at axes"),
    "tensor-absent": (lambda c, t: t.pop("0"), "tensors must be in the file, got no '0'"),
    "tensor-unused": (lambda c, t: t.update(more=torch.ones(1)), "a place in the state, got 1 without, 'more'"),
}


@pytest.mark.parametrize("case", SPECTRA)
def test_a_file_that_was_changed_is_refused_in_one_line_with_its_name(case: str, tmp_path: Path) -> None:
    change, match = SPECTRA[case]
    write_state(spectra(1), tmp_path / "state")
    changed(tmp_path / "state", change)
    with pytest.raises(ValueError, match=match) as caught:
        read_state(tmp_path / "state", GradientSpectra)
    assert str(caught.value).endswith(f"; in {tmp_path / 'state'}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_moments_of_a_fisher_must_be_possible(tmp_path: Path) -> None:
    for moments in ([0, 1.0, 1.0], [2, -1.0, 1.0], [2, 1.0, -1.0]):
        names = dict(zip(Moments._fields, moments, strict=True))
        write_state(EmpiricalFisher(moments={"a": Moments(2, 1.0, 1.0)}), tmp_path / "state")
        changed(tmp_path / "state", lambda c, t, names=names: at(c, "state", "moments").update(a=names))
        with pytest.raises(ValueError, match=r"of at least one example and ≥ 0, got .*; at state\.moments\['a'\]"):
            read_state(tmp_path / "state", EmpiricalFisher)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_that_are_not_finite_are_refused(number: str, tmp_path: Path) -> None:
    write_state(EmpiricalFisher(moments={"a": Moments(2, 0.125, 1.0)}), tmp_path / "state")
    with safe_open(tmp_path / "state", framework="pt") as file:
        text = file.metadata()["flowra_state"].replace("0.125", number)
    save_file({}, tmp_path / "state", metadata={"flowra_state": text})
    with pytest.raises(ValueError, match=r"must be finite, got (nan|inf|-inf); at state\.moments\['a'\]\.mean"):
        read_state(tmp_path / "state", EmpiricalFisher)


def test_second_moments_must_fit_together(tmp_path: Path) -> None:
    signals = Signals(torch.randn(2, 3, 40), torch.randn(2, 3, 30))
    state = KFAC.init(dense_limit=4, size=3).update("a", signals)
    path = tmp_path / "state"
    for field, tensor in (
        ("probes", torch.ones(40, 2)),
        ("sums", torch.ones(3, 40)),
        ("squares", torch.ones(1, 2, 20)),
    ):
        write_state(state, path)

        def change(content: Content, tensors: dict[str, Tensor], field: str = field, tensor: Tensor = tensor) -> None:
            inputs = at(content, "state", "moments", "a", "inputs")
            tensors[str(at(inputs, field)["tensor"])] = tensor

        changed(path, change)
        with pytest.raises(ValueError, match=r"(must have shapes|must be \(d,\)).*; at state\.moments\['a'\]\.inputs"):
            read_state(path, KFAC)
    write_state(state, path)
    changed(path, lambda c, t: at(c, "state", "moments", "a", "inputs").update(per="row"))
    with pytest.raises(ValueError, match=r"one of \('token', 'example'\), got 'row'; at .*\.per"):
        read_state(path, KFAC)


def test_sums_of_a_diagonal_fisher_must_fit_its_reduction(tmp_path: Path) -> None:
    state = DiagonalFisher.init(reduction="rows").update("a", Signals(torch.randn(2, 3, 4), torch.randn(2, 3, 5)))
    write_state(state, tmp_path / "state")
    changed(tmp_path / "state", lambda c, t: at(c, "state").update(reduction="none"))
    with pytest.raises(ValueError, match=r"of 2 axes, got torch.float64 \(5,\) for 'a'; at state"):
        read_state(tmp_path / "state", DiagonalFisher)


def impossible(path: Path, state: object, change: Callable[[Content, dict[str, Tensor]], object], match: str) -> None:
    write_state(state, path)
    changed(path, change)
    with pytest.raises(ValueError, match=match):
        read_state(path, type(state))


def test_sums_of_squares_below_zero_are_refused(tmp_path: Path) -> None:
    signals = Signals(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    factors = KFAC.init().update("a", signals)
    states = [
        factors,
        DiagonalFisher.init(reduction="rows").update("a", signals),
        EKFAC.init(factors.finalise()).update("a", signals),
        ActivationSpectra.init().update("a", signals),
    ]

    def change(content: Content, tensors: dict[str, Tensor]) -> None:
        for each in tensors.values():
            each.copy_(-each.abs())

    for index, state in enumerate(states):
        impossible(tmp_path / str(index), state, change, "sums of squares must be ≥ 0, got -")


def test_what_was_corrected_must_fit_its_bases(tmp_path: Path) -> None:
    signals = Signals(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    state = EKFAC.init(KFAC.init().update("a", signals).finalise()).update("a", signals)
    cases: list[tuple[Callable[[Content, dict[str, Tensor]], object], str]] = [
        (lambda c, t: at(c, "state", "counts").update(a=-3), "of -3 examples"),
        (lambda c, t: at(c, "state").update(counts={}), "must be of the same modules"),
        (lambda c, t: t.update({at(c, "state", "sums", "a")["tensor"]: torch.ones(5, 3)}), "must have shapes"),
    ]
    for index, (change, match) in enumerate(cases):
        impossible(tmp_path / str(index), state, change, match)


def test_a_moment_has_a_module_and_a_module_a_moment(tmp_path: Path) -> None:
    state = ActivationSpectra.init().update("a", Signals(torch.randn(2, 3, 4), torch.randn(2, 3, 5)))
    impossible(tmp_path / "state", state, lambda c, t: at(c, "state", "keys").update(a="zzz"), "those of the moments")


def test_mean_gradients_are_of_examples(tmp_path: Path) -> None:
    state = MeanGradients.init().update("a", Signals(torch.randn(2, 3, 4), torch.randn(2, 3, 5)))
    gradient = ("state", "gradients", "a")
    cases: list[tuple[Callable[[Content, dict[str, Tensor]], object], str]] = [
        (lambda c, t: at(c, *gradient).update(num_examples=0), "of at least one example"),
        (lambda c, t: t.update({k: each.long() for k, each in t.items()}), "torch.float32 or torch.float64"),
    ]
    for index, (change, match) in enumerate(cases):
        impossible(tmp_path / str(index), state, change, match)


def test_a_class_that_refuses_a_value_says_so(tmp_path: Path) -> None:
    write_state(Everything(), tmp_path / "state")
    changed(tmp_path / "state", lambda c, t: at(c, "state").update(number=-1))
    with pytest.raises(ValueError, match=r"number must be ≥ 0, got -1; at state; in "):
        read_state(tmp_path / "state", Everything)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(ValueError, match=r"path must be a file, got .*state"):
        read_state(path, EmpiricalFisher)
    with pytest.raises(ValueError, match="path must be a file"):
        read_state(tmp_path, EmpiricalFisher)
    write_state(spectra(), path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x80\x04", whole[:-1], whole[:100], whole[:7], b"\xff" * 8 + whole[8:], whole + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a whole safetensors file, got"):
            read_state(path, GradientSpectra)
        with pytest.raises(ValueError, match="data must be a whole safetensors file, got"):
            state_from_bytes(damaged, GradientSpectra)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must hold 'flowra_state', got none"):
        read_state(path, EmpiricalFisher)
    with pytest.raises(ValueError, match="must hold 'flowra_state', got none"):
        state_from_bytes(path.read_bytes(), EmpiricalFisher)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must be JSON, got Expecting value"),
        ("3", "must be an object, got 3"),
        ("[" * 200_000, "nested too deeply|must be JSON"),
        ('{"class":' * 200_000, "nested too deeply|must be JSON"),
        ('{"format_version": ' + "9" * 5000 + "}", "must be JSON, got Exceeds the limit"),
        ('{"class": 1, "class": 2}', r"a key twice among \['class', 'class'\]"),
        (" " * (2**26 + 1), "must be at most 67108864 characters, got 67108865"),
    ],
    ids=["empty", "number", "deep-array", "deep-object", "long-number", "key-twice", "large"],
)
def test_hostile_json_is_refused(text: str, match: str, tmp_path: Path) -> None:
    save_file({}, tmp_path / "state", metadata={"flowra_state": text})
    with pytest.raises(ValueError, match=match):
        read_state(tmp_path / "state", EmpiricalFisher)
