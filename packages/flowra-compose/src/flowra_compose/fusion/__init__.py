"""Token-level fusion: k frozen adapters on one model, weighed anew at every position by small gates.

>>> gates = gates_for(model, {"language": a, "task": b})  # doctest: +SKIP
>>> with fuse(model, {"language": a, "task": b}, gates):  # doctest: +SKIP
...     train(model)  # only gates learn
...     model.generate(**prompt)  # with a cache of keys and values
"""

from flowra_compose.fusion.failure_signs import FailureSign, failure_signs, loss_gap_warning, weight_gap_warning
from flowra_compose.fusion.fusion import Fusion, OtherPositionsError, fuse, gates_for
from flowra_compose.fusion.fusion_record import FusionRecord
from flowra_compose.fusion.gate_files import adapter_fingerprint, adapter_names, read_gates, write_gates
from flowra_compose.fusion.gates import Gate, GateOptions, Gates
from flowra_compose.fusion.inspection import GateInspection, TextWeights, WeightSummary, weights_of_texts
from flowra_compose.fusion.routing import Arrow, Routing, SpectR, StaticWeights
from flowra_compose.fusion.static_search import StaticSearch, search_static_weights

__all__ = [
    "Arrow",
    "FailureSign",
    "Fusion",
    "FusionRecord",
    "Gate",
    "GateInspection",
    "GateOptions",
    "Gates",
    "OtherPositionsError",
    "Routing",
    "SpectR",
    "StaticSearch",
    "StaticWeights",
    "TextWeights",
    "WeightSummary",
    "adapter_fingerprint",
    "adapter_names",
    "failure_signs",
    "fuse",
    "gates_for",
    "loss_gap_warning",
    "read_gates",
    "search_static_weights",
    "weight_gap_warning",
    "weights_of_texts",
    "write_gates",
]
