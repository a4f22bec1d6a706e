"""Where each module stands in a picture of blocks × kinds of modules."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from flowra_analysis import LAYER_TYPES, layer_type
from flowra_pipelines.figure_style import plain_name

__all__ = ["ModuleGrid", "frame_cells", "frame_grid", "layer_and_kind", "module_grid", "rows_by_type"]

BLOCK = re.compile(r"(?:^|\.)(\d{1,9})\.(.+)$")
"""The index of a block and what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleGrid:
    """Where each module stands in a picture of blocks × kinds of modules."""

    kinds: tuple[str, ...]
    """Rows: what a module is in its block, in the order of the modules."""
    blocks: tuple[int | None, ...]
    """Columns: ascending; None, at the end, for modules outside blocks."""
    places: Mapping[str, tuple[int, int]]
    """Module name to row and column; no two modules share a place."""


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Split a module name into the index of its block and what it is there.

    Returns:
        The index, None outside blocks, and the rest of the name.

    Example:
        >>> layer_and_kind("bert.encoder.layer.3.attention.self.query")
        (3, 'attention.self.query')
        >>> layer_and_kind("bert.pooler.dense")
        (None, 'bert.pooler.dense')
    """
    match = BLOCK.search(name)
    return (int(match[1]), match[2]) if match else (None, name)


def module_grid(names: Iterable[str]) -> ModuleGrid:
    """Find a row and a column for each module.

    Where two stacks of blocks have modules of the same name (an encoder and a decoder), the kind begins with the stack.

    Args:
        names: of modules, each once.

    Returns:
        The places.
    """
    split = {name: layer_and_kind(name) for name in names}
    count = Counter(split.values())
    stack = {name: name[: match.start()] for name in split if (match := BLOCK.search(name))}
    double = {kind for (_, kind), times in count.items() if times > 1}
    kind_of = {name: f"{stack[name]}: {kind}" if kind in double else kind for name, (_, kind) in split.items()}
    kinds = tuple(dict.fromkeys(kind_of.values()))
    numbers = sorted({block for block, _ in split.values() if block is not None})
    blocks = (*numbers, *([None] if any(block is None for block, _ in split.values()) else []))
    rows = {kind: row for row, kind in enumerate(kinds)}
    columns = {block: column for column, block in enumerate(blocks)}
    places = {name: (rows[kind_of[name]], columns[block]) for name, (block, _) in split.items()}
    return ModuleGrid(kinds=kinds, blocks=blocks, places=places)


def rows_by_type(place: ModuleGrid) -> list[tuple[int, str]]:
    """Order the rows by type of layer, and name them: by the type where no other row has it, otherwise by the kind.

    Returns:
        Row of the grid and its label, from top to bottom.
    """
    type_of = {row: layer_type(name) for name, (row, _) in place.places.items()}
    count = Counter(type_of.values())
    order = sorted(type_of, key=lambda row: (LAYER_TYPES.index(type_of[row]), row))
    alone = {row for row in order if count[type_of[row]] == 1 and type_of[row] != "other"}
    return [(row, type_of[row] if row in alone else plain_name(place.kinds[row])) for row in order]


def frame_cells(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Name columns and rows of cells, the first row on top."""
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def frame_grid(axes: Axes, place: ModuleGrid, labels: Sequence[str]) -> None:
    """Name the blocks, and the rows as :func:`rows_by_type` does."""
    frame_cells(axes, ["–" if block is None else str(block) for block in place.blocks], labels)
    axes.set_xlabel("block" + ("   (–: outside the blocks)" if None in place.blocks else ""))
