"""What the backward pass keeps of a fused module grows with the sum of the ranks, not with outputs of adapters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.fusion.stacks import Stack, adapter, stack, states
from flowra_compose import AdapterState
from flowra_compose.fusion import GateOptions, fuse, gates_for

WIDTH, POSITIONS, RANK = 64, 32, 2


def kept(model: Stack, adapters: dict[str, AdapterState], level: Any) -> tuple[int, set[int]]:  # noqa: ANN401 - a literal
    """Return the numbers that a backward pass keeps besides the model's and the adapters', and their last sides."""
    gates = gates_for(model, adapters, GateOptions(level=level, initial="uniform"))
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with fuse(model, adapters, gates):
        lasting = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(states(size=1, length=POSITIONS, width=WIDTH, dtype=torch.float32))
        assert output.requires_grad
    found = {key: each for key, each in seen.items() if key not in lasting}
    return sum(each.numel() for each in found.values()), {each.shape[-1] for each in found.values() if each.ndim == 3}


def ranks(model: nn.Module, count: int, rank: int) -> dict[str, AdapterState]:
    return {str(index): adapter(model, ("up", "down", "skip"), rank, seed=index, size=0.1) for index in range(count)}


@pytest.mark.parametrize("level", ["layer", "step", "module"])
def test_each_further_adapter_keeps_numbers_for_its_rank_and_weight_only(level: str) -> None:
    model = stack(width=WIDTH, layers=2, dtype=torch.float32)
    sizes = [kept(model, ranks(model, count, RANK), level)[0] for count in (2, 4, 8)]
    places = {"layer": 2, "step": 1, "module": 6}[level]
    for smaller, larger, more in ((sizes[0], sizes[1], 2), (sizes[1], sizes[2], 4)):
        # of each module A x and w along the ranks, of each gate its softmax; w itself where it is indexed
        limit = POSITIONS * more * (6 * 2 * RANK + 3 * places)
        assert 0 < larger - smaller <= limit
        assert larger - smaller < POSITIONS * more * WIDTH * 6 / 4  # far from a kept output of each adapter


def test_no_output_of_a_single_adapter_is_formed_or_kept() -> None:
    model = stack(width=WIDTH, layers=2, dtype=torch.float32)
    _, sides = kept(model, ranks(model, 8, RANK), "layer")
    assert max(sides) == 2 * WIDTH
    adapters = ranks(model, 8, RANK)
    with fuse(model, adapters, gates_for(model, adapters)), Largest() as largest:
        model(states(size=1, length=POSITIONS, width=WIDTH, dtype=torch.float32))
    assert largest.numbers == POSITIONS * 2 * WIDTH  # the output of `up` itself


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and look at what it made."""
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self._known(args):
                self.numbers = max(self.numbers, each.numel())
        return result

    @staticmethod
    def _known(args: Any) -> set[int]:  # noqa: ANN401
        return {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}


def test_ranks_are_what_memory_grows_with() -> None:
    model = stack(width=WIDTH, layers=2, dtype=torch.float32)
    narrow, wide = (kept(model, ranks(model, 2, rank), "layer")[0] for rank in (2, 8))
    assert wide - narrow == POSITIONS * 2 * (8 - 2) * (6 + 2)  # A x of six modules, w along the ranks of two blocks
