"""How fused projections order their output channels, architecture by architecture.

One matrix often makes queries, keys and values at once, or the gate and the value of a gated MLP. Where each lies is
nowhere in the weight: GPT-2 stacks q, k, v, GPT-NeoX stacks q, k, v head by head, Falcon has three orders, CodeGen has
q, v, k. So a layout is known for the class that reads the output, and for no other; sizes come from that module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

__all__ = ["LAYOUTS", "Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """Output channels are ``blocks`` blocks, and each block is its parts one after the other."""

    sizes: Mapping[str, int]
    """Part to its channels in one block, in their order."""
    blocks: int = 1
    """Such as heads."""

    @property
    def size(self) -> int:
        """Channels in all."""
        return self.blocks * sum(self.sizes.values())

    def rows(self) -> dict[str, slice | tuple[int, ...]]:
        """Return the channels of each part: a slice where they are contiguous, else their indices."""
        found: dict[str, slice | tuple[int, ...]] = {}
        start, step = 0, sum(self.sizes.values())
        for name, size in self.sizes.items():
            if self.blocks == 1:
                found[name] = slice(start, start + size)
            else:
                found[name] = tuple(
                    row
                    for block in range(self.blocks)
                    for row in range(block * step + start, block * step + start + size)
                )
            start += size
        return found


def layout_of(reader: nn.Module, layer: str, channels: int) -> Layout | None:
    """Tell how the output of a module's child is ordered.

    Args:
        reader: the module whose forward splits the output.
        layer: name of its child.
        channels: of the output.

    Returns:
        The layout, or None where it is not known.
    """
    for kind in type(reader).__mro__:
        find = LAYOUTS.get(f"{kind.__name__}.{layer}") if kind.__module__.startswith("transformers.") else None
        if find is not None:
            layout = find(reader, channels)
            return layout if layout is not None and layout.size == channels else None
    return None


def _equal(reader: Any, channels: int, *, parts: tuple[str, ...]) -> Layout:  # noqa: ANN401 - of another library
    """All of one part, then all of the next."""
    return Layout(dict.fromkeys(parts, channels // len(parts)))


def _by_head(reader: Any, channels: int, *, heads: str) -> Layout:  # noqa: ANN401
    """q, k, v of the first head, then of the next."""
    count = int(getattr(reader, heads))
    return Layout(dict.fromkeys(QKV, channels // count // 3), count)


def _gpt2(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """q, k, v, but k and v only where the block attends to an encoder."""
    return _equal(reader, channels, parts=("k", "v") if reader.is_cross_attention else QKV)


def _gpt_bigcode(reader: Any, channels: int) -> Layout | None:  # noqa: ANN401
    """With one key-value head q, k, v; else head by head."""
    if reader.is_cross_attention:
        return None
    if reader.multi_query:
        return Layout({"q": reader.embed_dim, "k": reader.kv_dim, "v": reader.kv_dim})
    return _by_head(reader, channels, heads="num_heads")


def _phi3(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """h_q · d_h, h_kv · d_h, h_kv · d_h."""
    shared = reader.num_key_value_heads * reader.head_dim
    return Layout({"q": reader.config.num_attention_heads * reader.head_dim, "k": shared, "v": shared})


def _dbrx(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """d, h_kv · d_h, h_kv · d_h."""
    shared = reader.num_key_value_heads * reader.head_dim
    return Layout({"q": reader.hidden_size, "k": shared, "v": shared})


def _falcon(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """Queries of a group before its key and value; or one key and value behind all queries; or head by head."""
    size = reader.head_dim
    if reader.new_decoder_architecture:
        groups = reader.num_kv_heads
        return Layout({"q": reader.num_heads // groups * size, "k": size, "v": size}, groups)
    if reader.multi_query:
        return Layout({"q": reader.num_heads * size, "k": size, "v": size})
    return _by_head(reader, channels, heads="num_heads")


def _gpt_neox(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """Head by head."""
    return Layout(dict.fromkeys(QKV, reader.head_size), channels // (3 * reader.head_size))


def _codegen(reader: Any, channels: int) -> Layout:  # noqa: ANN401
    """q, v, k in each of the four pieces that it was once trained in."""
    return Layout(dict.fromkeys(("q", "v", "k"), channels // 12), 4)


QKV = ("q", "k", "v")
_stacked = partial(_equal, parts=QKV)
_gate_up = partial(_equal, parts=("gate", "up"))

LAYOUTS: Mapping[str, Callable[[Any, int], Layout | None]] = MappingProxyType({
    "GPT2Attention.c_attn": _gpt2,
    "DecisionTransformerGPT2Attention.c_attn": _gpt2,
    "GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "Phi3Attention.qkv_proj": _phi3,
    "Phi4MultimodalAttention.qkv_proj": _phi3,
    "CodeGenAttention.qkv_proj": _codegen,
    "GPTNeoXAttention.query_key_value": _gpt_neox,
    "GPTNeoXJapaneseAttention.query_key_value": _gpt_neox,
    "BloomAttention.query_key_value": partial(_by_head, heads="num_heads"),
    "PersimmonAttention.query_key_value": partial(_by_head, heads="num_heads"),
    "FalconAttention.query_key_value": _falcon,
    "ModernBertAttention.Wqkv": _stacked,
    "MptAttention.Wqkv": _stacked,
    "DbrxAttention.Wqkv": _dbrx,
    **dict.fromkeys(
        (
            "SamVisionAttention.qkv",
            "SamHQVisionAttention.qkv",
            "VitDetAttention.qkv",
            "BlipAttention.qkv",
            "Blip2Attention.qkv",
            "InstructBlipAttention.qkv",
            "TimesformerSelfAttention.qkv",
            "VisionAttention.qkv",
            "Qwen2_5_VLVisionAttention.qkv",
            "Qwen3VLVisionAttention.qkv",
            "Glm4vVisionAttention.qkv",
        ),
        _stacked,
    ),
    **dict.fromkeys(
        (
            "Phi3MLP.gate_up_proj",
            "Phi4MultimodalMLP.gate_up_proj",
            "GlmMLP.gate_up_proj",
            "Glm4MLP.gate_up_proj",
            "Glm4vTextMLP.gate_up_proj",
        ),
        _gate_up,
    ),
})
"""``<class>.<child>`` of ``transformers`` to the order of the child's output channels."""
