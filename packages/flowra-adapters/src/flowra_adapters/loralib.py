"""Adapters as the first implementation of LoRA published them (Hu et al. 2022, arXiv:2106.09685, ``loralib``).

A state dict of ``<module>.lora_A`` ``(r, n)`` and ``<module>.lora_B`` ``(m, r)`` beside the tensors of modules trained
in full. It does not say α. Of a fused projection, where only some of its equal blocks of rows are adapted, k of them
say, A is ``(k · r, n)`` and B ``(k · m_block, r)``: an update of rank r for each block.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from flowra_adapters.checkpoint import AdapterCheckpoint, owner_of

__all__ = ["from_loralib"]


def from_loralib(
    tensors: Mapping[str, Tensor],
    *,
    alpha: float,
    trained_modules: Iterable[str] = (),
    adapted_blocks: Sequence[bool] = (),
    fan_in_fan_out: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> AdapterCheckpoint:
    """Turn a state dict of ``loralib``'s linear and merged linear layers into values.

    Args:
        tensors: name to tensor; read the file with safetensors.
        alpha: α of the run; s = α/r.
        trained_modules: names of modules trained in full, such as ``classifier``.
        adapted_blocks: of fused projections, which of their blocks of rows are adapted (``enable_lora``), such as
            ``(True, False, True)`` for queries and values.
        fan_in_fan_out: whether the base stores these weights transposed (GPT-2).
        base_model_name_or_path: where the base comes from, for the reader.
        task_type: PEFT's, such as ``SEQ_CLS``, for the reader.

    Returns:
        The values; the update of a fused projection has rank k · r and B block by block.

    Raises:
        ValueError: if a factor is alone, a tensor is neither a factor nor in a trained module, or shapes do not fit.
    """
    trained = tuple(trained_modules)
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B") and module:
            halves.setdefault(module, {})[leaf] = tensor
        elif owner_of(key, trained) is not None:
            saved[key] = tensor
        else:
            raise ValueError(f"tensors must be lora_A, lora_B or lie in trained_modules {trained}, got {key[:200]!r}")
    alone = [module for module, pair in halves.items() if len(pair) != 2]
    if alone or not halves:
        raise ValueError(f"every module must have lora_A and lora_B, got {alone or 'no factors'}")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scalings: dict[str, float] = {}
    for module, pair in sorted(halves.items()):
        a, b = pair["lora_A"], pair["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
            raise ValueError(
                f"factors must be A (r, n) and B (m, r), got {tuple(a.shape)}, {tuple(b.shape)}, {module!r}"
            )
        scalings[module] = alpha / b.shape[1]
        factors[module] = (a, b) if len(a) == b.shape[1] else (a, _blocks(module, a, b, adapted_blocks))
    return AdapterCheckpoint(
        factors=factors,
        scalings=scalings,
        modules_to_save=saved,
        trained_modules=trained,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        fan_in_fan_out=fan_in_fan_out,
    )


def _blocks(module: str, a: Tensor, b: Tensor, adapted: Sequence[bool]) -> Tensor:
    """Put the block of B of each adapted block of rows into its rows, and into the columns of its rows of A."""
    count, rank = sum(adapted), b.shape[1]
    if count == 0 or len(a) != count * rank or len(b) % count:
        raise ValueError(
            f"adapted_blocks must say which blocks {module!r} adapts, got {tuple(adapted)} for A {tuple(a.shape)} and B"
            f" {tuple(b.shape)}"
        )
    rows = len(b) // count
    made = b.new_zeros(len(adapted) * rows, len(a))
    blocks = [index for index, each in enumerate(adapted) if each]
    for number, block in enumerate(blocks):
        own = b[number * rows : (number + 1) * rows]
        made[block * rows : (block + 1) * rows, number * rank : (number + 1) * rank] = own
    return made
