"""The demo's comparison over learning rates, seeds and policies of refinement; resumable.

python benchmarks/bench_demo_grid.py FOLDER [--seeds 2]

All methods see the same examples in the same order for the same number of steps, the probe's included. Printed per
method: accuracy at its best learning rate, mean over seeds, and the paired differences of accuracy to uniform LoRA.
"""

import argparse
import json
import statistics
from pathlib import Path

from _results import Row, write

from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import STAGES, StageResult, run_stage
from flowra_pipelines.stages.table import WORK

DEMO = Path(__file__).parent.parent / "pipelines" / "flowra_pipelines" / "configs" / "demo.yaml"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
POLICIES = ("shrink", "breathe", "none")
"""The default first."""


def unlogged(result: StageResult, folder: Path) -> None:
    """Log nothing."""


def configuration(folder: Path, seed: int, rate: float, policy: str) -> RunConfig:
    """Return the demo at a seed, learning rate and policy; baselines are run once, beside the default policy."""
    overrides = {
        "name": f"seed{seed}-lr{rate:g}-{policy}",
        "output_root": folder,
        "seed": seed,
        "training.learning_rate": rate,
        "refinement.policy": policy,
        "evaluation.baselines": "[base, uniform]" if policy == POLICIES[0] else "[]",
        "merge.save_model": "false",
    }
    return load_config(DEMO, [f"{key}={value}" for key, value in overrides.items()])


def accuracies(config: RunConfig) -> dict[str, float]:
    """Run all stages, or reuse them, and read the accuracies."""
    for name in STAGES:
        run_stage(name, WORK[name], config, log=unlogged)
    metrics = json.loads((config.folder / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    return {name: row["accuracy"]["value"] for name, row in metrics["rows"].items()}


def main() -> None:
    """Run the grid and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    table: dict[tuple[str, float], list[float]] = {}
    for seed in range(arguments.seeds):
        for rate in LEARNING_RATES:
            done = arguments.folder / f"seed{seed}-lr{rate:g}.json"
            if not done.exists():
                found: dict[str, float] = {}
                for policy in POLICIES:
                    of_policy = accuracies(configuration(arguments.folder, seed, rate, policy))
                    found |= {f"flowra, {policy}" if name == "flowra" else name: of_policy[name] for name in of_policy}
                done.write_text(json.dumps(found), encoding="utf-8")
            for method, value in json.loads(done.read_text(encoding="utf-8")).items():
                table.setdefault((method, rate), []).append(value)
    best = {
        method: max((rate for each, rate in table if each == method), key=lambda r: statistics.mean(table[method, r]))
        for method in dict.fromkeys(method for method, _ in table)
    }
    uniform = table["uniform", best["uniform"]]
    rows = []
    for (method, rate), values in table.items():
        rows.append(Row(what=f"{method}, lr {rate:g}: accuracy, mean of {len(values)} seeds", ours=_mean(values)))
    for method, rate in best.items():
        gap = [ours - theirs for ours, theirs in zip(table[method, rate], uniform, strict=True)]
        what = f"{method} at its best lr {rate:g}: accuracy against uniform at its best"
        rows.append(Row(what=what, ours=_mean(table[method, rate]), peer=_mean(uniform)))
        rows.append(Row(what=f"{method}: smallest paired difference over seeds", ours=round(min(gap), 4)))
        rows.append(Row(what=f"{method}: largest paired difference over seeds", ours=round(max(gap), 4)))
    print(write("demo_grid", rows, command=f"python benchmarks/bench_demo_grid.py FOLDER --seeds {arguments.seeds}"))


def _mean(values: list[float]) -> float:
    return round(statistics.mean(values), 4)


if __name__ == "__main__":
    main()
