"""Merge two adapters from files to files, exactly: flowra_compose alone.

The adapters differ in rank, scaling and target modules, and each brings a head of its own. The merged update is the
weighted sum of the updates; the heads cannot be mixed, so one of them must be chosen.

Run: python examples/merge_adapters.py [out_dir]
"""

import sys
import tempfile
from pathlib import Path

import torch

from flowra_compose import AdapterState, LowRankUpdate, merge_folders, read_adapter, write_adapter

SHAPES = {"encoder.query": (32, 32), "encoder.value": (32, 32), "encoder.output": (32, 64)}


def adapter(ranks: dict[str, int], *, scaling: float, seed: int) -> AdapterState:
    """Make up an adapter with random factors and a random head."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: LowRankUpdate(
            torch.randn(rank, SHAPES[name][1], generator=generator),
            torch.randn(SHAPES[name][0], rank, generator=generator),
            scaling=scaling,
        )
        for name, rank in ranks.items()
    }
    head = {"classifier.weight": torch.randn(3, 32, generator=generator), "classifier.bias": torch.zeros(3)}
    return AdapterState(updates=updates, modules_to_save=head, base_model_name_or_path="a-base", task_type="SEQ_CLS")


def main(out: Path) -> None:
    """Write two adapters, merge them, and check the result against the sum of the updates."""
    news = adapter({"encoder.query": 4, "encoder.value": 2}, scaling=2.0, seed=1)
    code = adapter({"encoder.query": 8, "encoder.output": 1}, scaling=0.5, seed=2)
    for name, state in {"news": news, "code": code}.items():
        write_adapter(state, out / name)
        ranks = {module: update.rank for module, update in state.updates.items()}
        print(f"{name}: ranks {ranks}")

    folders, weights = [out / "news", out / "code"], [0.7, 0.3]
    try:
        merge_folders(folders, weights, out / "merged")
    except ValueError as error:
        print(f"refused: {error}")
    merge_folders(folders, weights, out / "merged", heads_from=0)

    merged = read_adapter(out / "merged")
    for name, update in merged.updates.items():
        expected = sum(
            weight * one.updates[name].delta_weight()
            for one, weight in ((news, 0.7), (code, 0.3))
            if name in one.updates
        )
        error = float((update.delta_weight() - expected).abs().max())
        print(f"  {name}: rank {update.rank}, scaling {update.scaling:g}, largest error of the sum {error:.1e}")
    same = torch.equal(merged.modules_to_save["classifier.weight"], news.modules_to_save["classifier.weight"])
    print(f"head: that of news ({same}); merged adapter in {out / 'merged'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="flowra-")))
