"""What Prefect and MLflow add to the six stages, and how fast the command answers.

python benchmarks/bench_orchestration.py [--rounds N]

The run is the tiny one of the tests: 40 steps of a two-layer encoder, so that the stages cost little beside what is
measured. Each way is a fresh process with one thread, imports included, and every stage runs. The ways take turns; a
figure is the best of the rounds, and what is added the difference of two such. Without Prefect and MLflow, the stages
write the same files and log nothing; with them, the process is ``flowra run``, once with the databases of an earlier
run and once with none.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from _results import Row, write

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from flowra_testing.tiny_runs import tiny_config

FLOWRA = str(Path(sys.executable).parent / "flowra")
DIRECT = """
import sys
from pathlib import Path
from flowra_pipelines.run_config import load_config
from flowra_pipelines.stages.record import STAGES, run_stage
from flowra_pipelines.stages.table import WORK

config = load_config(Path(sys.argv[1]))
for name in STAGES:
    run_stage(name, WORK[name], config, log=lambda result, folder: None, force=True)
assert not {"prefect", "mlflow"} & set(sys.modules)
"""


def seconds(command: list[str], folder: Path) -> float | None:
    """Run a command in a folder of its own, with its own Prefect database; None if it failed."""
    folder.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)  # a server of the user's would be no part of the figure
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return time.perf_counter() - started
    print(done.stderr[-2000:], file=sys.stderr)
    return None


def best(taken: list[float | None]) -> float | None:
    """Return the shortest time; None if a run failed."""
    times = [one for one in taken if one is not None]
    return min(times) if len(times) == len(taken) else None


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = scratch / "run.yaml"
        config.write_text(yaml.safe_dump({**tiny_config(scratch), "output_root": "runs"}))
        direct = [sys.executable, "-c", DIRECT, str(config)]
        flow = [FLOWRA, "run", str(config), "--force"]
        seconds(flow, scratch / "again")  # makes the databases
        ways: dict[str, list[float | None]] = {"direct": [], "again": [], "first": [], "help": [], "explain": []}
        for each in range(rounds):
            ways["direct"].append(seconds(direct, scratch / "direct"))
            ways["again"].append(seconds(flow, scratch / "again"))
            ways["first"].append(seconds(flow, scratch / f"first{each}"))
            ways["help"].append(seconds([FLOWRA, "--help"], scratch / "command"))
            ways["explain"].append(seconds([FLOWRA, "config", "explain"], scratch / "command"))
            print({way: None if taken[-1] is None else round(taken[-1], 2) for way, taken in ways.items()}, flush=True)
    found = {way: best(taken) for way, taken in ways.items()}
    base = found["direct"]

    def added(way: str) -> float | None:
        total = found[way]
        return None if base is None or total is None else round(total - base, 2)

    def alone(way: str) -> float | None:
        total = found[way]
        return None if total is None else round(total, 2)

    rows = [
        Row(what="six stages of the tiny run without Prefect and MLflow, seconds", ours=alone("direct")),
        Row(
            what="Prefect + MLflow add, databases there: at most 12 seconds", ours=added("again"), limit=12, sense="<="
        ),
        Row(what="Prefect + MLflow add, first run: at most 20 seconds", ours=added("first"), limit=20, sense="<="),
        Row(what="flowra --help: under 0.5 seconds", ours=alone("help"), limit=0.5, sense="<="),
        Row(what="flowra config explain: under 1 second", ours=alone("explain"), limit=1, sense="<="),
    ]
    print(write("orchestration", rows, command=f"python benchmarks/bench_orchestration.py --rounds {rounds}"))


if __name__ == "__main__":
    main()
