"""States of every statistic on a tiny model, and two things that other processes do with them.

``python -m flowra_testing.measuring_child resume FOLDER`` reads ``FOLDER/<kind>.half``, measures the second half of the
batches and writes ``FOLDER/<kind>.whole``. ``… gather FOLDER RANK`` is one of two processes: it measures its own half
of the batches, merges over processes and writes ``FOLDER/<kind>.<RANK>`` and what went wrong with states that do not
fit.
"""

import json
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowra_analysis import (
    DiagonalFisher,
    EmpiricalFisher,
    GradientSpectra,
    Statistic,
    measure,
    merged_over_processes,
    read_state,
    write_state,
)
from flowra_analysis.activation_spectra import ActivationSpectra
from flowra_analysis.ekfac import EKFAC
from flowra_analysis.empirical_fisher import Moments
from flowra_analysis.flow_spectrum import MeanGradients
from flowra_analysis.kfac import KFAC, kronecker_factors

NAMES = ["table", "q", "k", "mix", "head"]
KINDS = [
    "fisher",
    "diagonal",
    "rows",
    "columns",
    "gradient",
    "mean-gradients",
    "kfac",
    "kfac-reduce",
    "kfac-dense",
    "ekfac",
    "activations",
]


class Network(nn.Module):
    """An embedding, two layers that see the same input, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mix = nn.Conv1d(8, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``(N, T)`` to ``(N, T − 2, 3)``."""
        h = self.table(ids)
        h = torch.tanh(self.q(h)) * self.k(h)
        output: Tensor = self.head(torch.tanh(self.mix(h.mT)).mT)
        return output


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return ``(N,)``."""
    squares: Tensor = model(ids).square().sum((1, 2))
    return squares


def batches() -> list[Tensor]:
    """Return six of different sizes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 12, (num, 7), generator=generator) for num in (3, 1, 4, 2, 5, 3)]


def begin(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Statistic]]:
    """Return the model and the empty states by kind; small limits, so that what can be sketched is."""
    model = Network().to(dtype).eval()
    return model, {
        "fisher": EmpiricalFisher.init(),
        "diagonal": DiagonalFisher.init(),
        "rows": DiagonalFisher.init(reduction="rows"),
        "columns": DiagonalFisher.init(reduction="columns"),
        "gradient": GradientSpectra.init(size=2, seed=3),
        "mean-gradients": MeanGradients.init(dense_limit=50, size=2),
        "kfac": KFAC.init(dense_limit=4, size=3),
        "kfac-reduce": KFAC.init(weight_sharing="reduce"),
        "kfac-dense": KFAC.init(),
        "ekfac": EKFAC.init(kronecker_factors(model, batches(), loss, NAMES)),
        "activations": ActivationSpectra.init(dense_limit=4, size=3),
    }


def measured(model: nn.Module, states: dict[str, Statistic], part: slice) -> dict[str, Statistic]:
    """Feed some of the batches."""
    return measure(model, batches()[part], loss, NAMES, states)


def named(state: Statistic) -> Statistic:
    """Return a state whose parts have the names of modules, not of memory addresses."""
    if not isinstance(state, ActivationSpectra):
        return state
    return replace(
        state,
        keys={name: name for name in state.keys},
        moments={name: state.moments[key] for name, key in state.keys.items()},
    )


def assert_same(found: object, expected: object, *, rtol: float, where: str = "") -> None:
    """Assert that two states have the same structure and whole numbers, and other numbers to within a tolerance."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        scale = float(expected.double().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * scale, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rtol), where
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys(), where
        for key, each in expected.items():
            assert_same(found[key], each, rtol=rtol, where=f"{where}[{key!r}]")
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple)
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, rtol=rtol, where=f"{where}[{index}]")
    elif is_dataclass(expected):
        for each in fields(expected):
            name = each.name
            assert_same(getattr(found, name), getattr(expected, name), rtol=rtol, where=f"{where}.{name}")
    else:
        assert found == expected, where


def resume(folder: Path) -> None:
    """Go on with states that another process wrote."""
    model, empty = begin(torch.float32)
    read = {kind: read_state(folder / f"{kind}.half", type(state)) for kind, state in empty.items()}
    for kind, state in measured(model, read, slice(3, None)).items():
        write_state(state, folder / f"{kind}.whole")


def gather(folder: Path, rank: int) -> None:
    """Be one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, empty = begin(torch.float64)
    mine = measured(model, empty, slice(rank, None, 2))
    for kind, state in mine.items():
        write_state(merged_over_processes(state), folder / f"{kind}.{rank}")
    alone = [dist.new_group([each]) for each in (0, 1)][rank]
    write_state(merged_over_processes(mine["fisher"], alone), folder / f"alone.{rank}")
    write_state(mine["fisher"], folder / f"own.{rank}")
    spoilt = EmpiricalFisher(moments={"a": Moments(1, float("nan"), 0.0)})
    unfit: dict[str, Statistic] = {
        "arguments": GradientSpectra.init(size=2 + rank),
        "class": [EmpiricalFisher.init(), GradientSpectra.init()][rank],
        "nan": [EmpiricalFisher.init(), spoilt][rank],
    }
    problems = {}
    for kind, state in unfit.items():
        try:
            merged_over_processes(state)
        except ValueError as error:
            problems[kind] = str(error)
    (folder / f"problems.{rank}").write_text(json.dumps(problems))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "resume":
        resume(Path(sys.argv[2]))
    else:
        gather(Path(sys.argv[2]), int(sys.argv[3]))
