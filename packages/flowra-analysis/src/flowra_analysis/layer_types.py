"""What part a layer plays in a transformer, read off its name, and what a profile says of each part.

Known are the names of BERT, RoBERTa, DistilBERT, DeBERTa, ALBERT, ModernBERT, Llama and its kin, Phi, Mixtral, GPT-2,
GPT-J, GPT-NeoX, BLOOM, OPT, BART, T5, ViT, CLIP and timm. What has another name is ``other``: so are output layers,
poolers and heads, whatever their names end in.
"""

import difflib
import math
import re
from collections import defaultdict
from dataclasses import dataclass

from flowra_analysis.flow_profile import FlowProfile

__all__ = ["LAYER_TYPES", "TypeSummary", "layer_type", "summarise"]

ATTENTION = r"\w*(?:attn|[aA]ttention)\w*"
FEED_FORWARD = r"(?:mlp|ffn|feed_forward|DenseReluDense|experts(?:\.\d+)?)"
BLOCK = r"\d+\.(?:\w+\.)*"
NAMES = {  # the first that the end of a name matches
    "Q": r"q|q_proj|q_lin|q_attn|query|query_proj",
    "K": r"k|k_proj|k_lin|key|key_proj",
    "V": r"v|v_proj|v_lin|value|value_proj",
    "QKV": rf"c_attn|qkv|qkv_proj|Wqkv|query_key_value|(?:{ATTENTION}|self)\.in_proj(?:_weight)?",
    "O": rf"o_proj|out_lin|{ATTENTION}\.(?:output\.dense|out_proj|c_proj|dense|proj|Wo|wo|o)",
    "gate": rf"gate_proj|wi_0|{FEED_FORWARD}\.w1",
    "up": rf"up_proj|wi_1|wi|intermediate\.dense|c_fc|fc_in|dense_h_to_4h|{BLOCK}(?:fc1|lin1|ffn)|{FEED_FORWARD}\.w3",
    "gate+up": r"gate_up_proj|mlp\.Wi",
    "down": rf"down_proj|output\.dense|fc_out|dense_4h_to_h|{BLOCK}(?:fc2|lin2|ffn_output)"
    rf"|{FEED_FORWARD}\.(?:w2|c_proj|Wo|wo)",
    "embedding": r"\w*embeddings?|embed_tokens|embed_positions|embed_in|wte|wpe|shared|relative_attention_bias"
    r"|patch_embeddings\.projection|patch_embed\.proj",
}
PATTERNS = {kind: re.compile(rf"(?:^|.*\.)(?:{names})", re.ASCII) for kind, names in NAMES.items()}
LONGEST = 200
"""Characters at the end of a name that are looked at."""
PARTS = {"q": "Q", "k": "K", "v": "V", "gate": "gate", "up": "up"}
LAYER_TYPES = (*NAMES, "other")
"""Query, key, value, those fused, the attention's output, the two or three matrices of the feed-forward part
(``gate+up``: fused), embeddings, and what is none of them. In this order wherever they are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeSummary:
    """One statistic over the modules of one type."""

    mean: float
    spread: float
    """Standard deviation over these modules, which are all there are: divided by their number. 0 for one."""
    count: int
    """Modules of this type that have the statistic, ≥ 1."""
    share: float | None
    """Their sum over the sum of all modules; None where that sum is 0 or beyond the range of numbers."""


def layer_type(name: str) -> str:
    """Tell which of :data:`LAYER_TYPES` a module is.

    Args:
        name: its qualified name; after a colon that of a part of a fused projection, as in ``h.0.attn.c_attn:q``.

    Returns:
        The type, ``other`` if the name is none that is known.

    >>> [layer_type(f"encoder.layer.3.{name}") for name in ("attention.output.dense", "output.dense", "adapter")]
    ['O', 'down', 'other']
    """
    module, _, part = name.partition(":")
    if part in PARTS:
        return PARTS[part]
    return next((kind for kind, pattern in PATTERNS.items() if pattern.fullmatch(module[-LONGEST:])), "other")


def summarise(profile: FlowProfile, statistic: str) -> dict[str, TypeSummary]:
    """Summarise one statistic by the type of layer.

    Args:
        profile: of any model.
        statistic: its name, such as ``psi``; modules that do not have it do not count.

    Returns:
        Type to summary, in the order of :data:`LAYER_TYPES`, without types that no module has.

    Raises:
        ValueError: if no module has the statistic.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for name, module in profile.modules.items():
        if statistic in module.statistics:
            values[layer_type(name)].append(float(module.statistics[statistic]))
    if not values:
        known = sorted({each for module in profile.modules.values() for each in module.statistics})
        near = ", ".join(difflib.get_close_matches(statistic, known, n=3, cutoff=0.0)) or "none"
        raise ValueError(f"statistic must be one of the profile's, got {statistic!r}; nearest: {near}")
    total = _sum([value for each in values.values() for value in each])
    return {kind: _summary(values[kind], total) for kind in LAYER_TYPES if kind in values}


def _summary(values: list[float], total: float) -> TypeSummary:
    count, part = len(values), _sum(values)
    mean = part / count
    spread = math.hypot(*(value - mean for value in values)) / math.sqrt(count)
    share = part / total if total != 0 and math.isfinite(total) else None
    return TypeSummary(mean=mean, spread=spread, count=count, share=share)


def _sum(values: list[float]) -> float:
    """Sum exactly; infinite beyond the range of numbers."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
