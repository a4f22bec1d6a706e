"""What the READMEs show runs as it stands, and links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("flowra-adapters", "flowra-allocation", "flowra-analysis", "flowra-compose")
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), ROOT / "CONTRIBUTING.md"])
MAX_LINES = 12


def python_blocks(package: str) -> list[str]:
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_readme_shows_its_package_in_at_most_twelve_lines(package: str) -> None:
    blocks = python_blocks(package)
    assert blocks
    assert min(len(block.splitlines()) for block in blocks) <= MAX_LINES


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_of_a_readme_runs_in_a_fresh_process(package: str, tmp_path: Path) -> None:
    blocks = python_blocks(package)
    if not blocks:
        pytest.skip("no code in this README")
    for index, block in enumerate(blocks):
        folder = tmp_path / str(index)
        folder.mkdir()
        (tmp_path / f"block_{index}.py").write_text(block, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "error", str(tmp_path / f"block_{index}.py")],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
