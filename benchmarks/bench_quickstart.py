"""Time the README's two commands on a fresh clone in a fresh environment, installation included.

python benchmarks/bench_quickstart.py [demo] [tests]
"""

import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from _results import Row, write

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 600


def seconds_of(session: str) -> float | None:
    """Clone HEAD, `pip install nox`, run the session; None if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "flowra"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        started = time.perf_counter()
        venv.create(clone / ".tool", with_pip=True)
        python = str(clone / ".tool" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "nox"], check=True, cwd=clone)
        done = subprocess.run([python, "-m", "nox", "-s", session], check=False, cwd=clone)
        return time.perf_counter() - started if done.returncode == 0 else None


def main() -> None:
    """Run the sessions named on the command line, by default both."""
    sessions = sys.argv[1:] or ["demo", "tests"]
    rows = [
        Row(
            what=f"pip install nox && nox -s {session}, fresh clone and environment, seconds",
            ours=round(taken, 1) if (taken := seconds_of(session)) is not None else None,
            limit=LIMIT_SECONDS,
            sense="<=",
        )
        for session in sessions
    ]
    print(write("quickstart", rows, command=f"python benchmarks/bench_quickstart.py {' '.join(sessions)}"))


if __name__ == "__main__":
    main()
