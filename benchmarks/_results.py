"""The one convention for results: see README.md."""

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Row", "write"]

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("flowra-pipelines", "torch", "transformers", "peft", "prefect", "mlflow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure, and its bar if it has one."""

    what: str
    ours: float | None
    """None if it was not run."""
    peer: float | None = None
    limit: float | None = None
    sense: Literal["<=", ">="] | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None without a bar, False if it was not run."""
        if self.limit is None:
            return None
        if self.ours is None:
            return False
        return self.ours <= self.limit if self.sense == "<=" else self.ours >= self.limit


def write(name: str, rows: Sequence[Row], *, command: str, part: bool = False) -> Path:
    """Print the rows and write them to ``results/<name>.json``.

    Args:
        name: of the benchmark.
        rows: its figures.
        command: that made them.
        part: whether rows of the file that are not among these stay, with the command and the date they have.

    Returns:
        The file.
    """
    stamp = {
        "command": command,
        "versions": _versions(),
        "processor": _processor(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    content = [{**asdict(row), "holds": row.holds, **stamp} for row in rows]
    for row in rows:
        bar = "" if row.limit is None else f"  {row.sense} {row.limit:g}: {'holds' if row.holds else 'MISSED'}"
        peer = "" if row.peer is None else f"  (peer {row.peer:g})"
        print(f"{row.what:<78} {'not run' if row.ours is None else f'{row.ours:g}'}{peer}{bar}")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    if part:
        new = {each["what"]: each for each in content}
        old = json.loads(path.read_text(encoding="utf-8"))
        content = [new.pop(each["what"], each) for each in old] + list(new.values())
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    """Name the processor and its widest instructions, which decide what is fast."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return f"{name[1] if name else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
