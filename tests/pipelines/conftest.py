"""What the tests of the command share."""

import sys
from collections.abc import Callable

import pytest

from flowra_pipelines.cli import main
from flowra_pipelines.progress import console


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, which has paid for the imports; exit code, what it printed, its errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowra", *map(str, arguments)])
        monkeypatch.setattr(console, "file", sys.stdout)
        monkeypatch.setattr(console, "width", 200)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run
