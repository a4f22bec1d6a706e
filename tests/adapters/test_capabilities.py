"""The page of capabilities says what is the case."""

import pytest

from flowra_testing.capabilities import LAYERS, PAGE, heading, line

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.compile's and the quantising library's own
]


def test_the_page_lists_every_method_and_layer_type() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert lines[: len(heading())] == heading()
    assert len(lines) == len(heading()) + len(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_fresh_trial_gives_the_line_of_the_page(name: str) -> None:
    assert line(name) in PAGE.read_text(encoding="utf-8").splitlines()
