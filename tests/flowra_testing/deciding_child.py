"""One of two processes that add up what they have seen and decide once: ``… deciding_child FOLDER RANK``.

It writes what it was told to ``FOLDER/<RANK>.safetensors`` and ``<RANK>.json``.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from flowra_allocation import Moves, Rebasing
from flowra_allocation.policy import NewTriplets
from flowra_allocation.processes import added_up, decided_once, several

CPU = torch.device("cpu")


def gathered(process: int) -> dict[str, dict[str, Tensor]]:
    """Return what an observer could have gathered: layer ``b`` has rank 0, and the probes are the same everywhere."""
    own = torch.Generator().manual_seed(process)
    alike = torch.Generator().manual_seed(7)
    made: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    for key, shape in {"activations": (3, 3), "gradients": (3, 3), "counts": (2,)}.items():
        made["a"][key] = torch.rand(shape, generator=own, dtype=torch.float64)
    for name, (m, n) in {"a": (5, 4), "b": (2, 6)}.items():
        for key, shape in {"basis_A": (n, 1), "omega": (n, 2)}.items():
            made[name][key] = torch.rand(shape, generator=alike)
        for key, shape in {"y": (m, 2), "z": (5, n)}.items():
            made[name][key] = torch.rand(shape, generator=own)
    return made


def moves(process: int) -> Moves:
    """Return moves of every kind, other ones on every process."""
    generator = torch.Generator().manual_seed(process)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Moves(
        keep={"a": (2, 0), "b": (), "c": Rebasing(lora_A=random(1, 4), lora_B=random(5, 1))},
        admit={"a": random(2, 4), "b": NewTriplets(lora_A=random(1, 6), lora_E=random(1), lora_B=random(2, 1))},
        silence={"a": (1,)},
        importance={"a": 0.1 + process, "b": 1 / 3},
        budget=90 + process,
        kkt_gap=1e-17,
        forget=True,
    )


def tensors_of(made: Moves) -> dict[str, Tensor]:
    """Return the tensors of :func:`moves` by name."""
    rebasing, rows, triplets = made.keep["c"], made.admit["a"], made.admit["b"]
    assert isinstance(rebasing, Rebasing)
    assert isinstance(rows, Tensor)
    assert isinstance(triplets, NewTriplets)
    return {
        "rebasing/A": rebasing.lora_A,
        "rebasing/B": rebasing.lora_B,
        "rows": rows,
        "triplets/A": triplets.lora_A,
        "triplets/E": triplets.lora_E,
        "triplets/B": triplets.lora_B,
    }


def plain_of(made: Moves) -> dict[str, object]:
    """Return the rest of :func:`moves`, and what kinds of values there are."""
    return {
        "keep": {name: each for name, each in made.keep.items() if name != "c"},
        "silence": dict(made.silence),
        "importance": dict(made.importance),
        "rest": [made.budget, made.kkt_gap, made.forget],
        "kinds": [type(each).__name__ for each in (*made.keep.values(), *made.admit.values(), *made.silence.values())],
    }


def main(folder: Path, rank: int) -> None:
    """Be one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    told, found = {}, {}
    for loss in ("mean", "sum"):
        for name, tensors in added_up(gathered(rank), loss=loss, device=CPU).items():
            told |= {f"{loss}/{name}/{key}": each.contiguous() for key, each in tensors.items()}
    made = decided_once(lambda: moves(rank), device=CPU)
    told |= tensors_of(made)
    found["moves"] = plain_of(made)
    found["empty"] = decided_once(Moves, device=CPU).budget
    for name, decide in {"undecided": lambda: 1 / 0, "unsendable": lambda: Moves(importance={"a": 1j})}.items():  # type: ignore[dict-item]
        try:
            decided_once(decide, device=CPU)  # type: ignore[arg-type]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    alone = [dist.new_group([each]) for each in (0, 1)][rank]
    both = dist.new_group([0, 1])
    found["several"] = [several(), several(alone), several(both)]
    found["groups"] = [decided_once(lambda: moves(rank), device=CPU, group=each).budget for each in (alone, both)]
    save_file(told, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
