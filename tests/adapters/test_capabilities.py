"""The page of capabilities says what is the case."""

import pytest

from flowra_testing.capabilities import LAYERS, PAGE, heading, line, title

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.compile's and the quantising library's own
]


def test_the_page_lists_every_method_and_layer_type() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert lines[: len(heading())] == heading()
    assert len(lines) == len(heading()) + len(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_fresh_trials_give_the_line_of_the_page_compiling_left_out(name: str) -> None:
    (written,) = (
        each for each in PAGE.read_text(encoding="utf-8").splitlines() if each.startswith(f"| {title(name)} |")
    )
    name_cell, cells = written.removeprefix("| ").split(" | ", 1)
    assert line(name, without="c") == f"| {name_cell} | {cells.replace('c', '')}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYERS)
def test_fresh_trials_give_the_line_of_the_page(name: str) -> None:
    assert line(name) in PAGE.read_text(encoding="utf-8").splitlines()
