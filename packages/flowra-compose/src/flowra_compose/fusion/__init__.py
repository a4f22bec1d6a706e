"""Token-level fusion: k frozen adapters on one model, weighed anew at every position by small gates.

>>> gates = gates_for(model, {"language": a, "task": b})  # doctest: +SKIP
>>> with fuse(model, {"language": a, "task": b}, gates):  # doctest: +SKIP
...     train(model)  # only gates learn
...     model.generate(**prompt)  # with a cache of keys and values
"""

from flowra_compose.fusion.fusion import Fusion, FusionRecord, fuse, gates_for
from flowra_compose.fusion.gate_files import adapter_fingerprint, adapter_names, read_gates, write_gates
from flowra_compose.fusion.gates import Gate, GateOptions, Gates
from flowra_compose.fusion.routing import Arrow, Routing, SpectR, StaticWeights
from flowra_compose.fusion.static_search import StaticSearch, search_static_weights

__all__ = [
    "Arrow",
    "Fusion",
    "FusionRecord",
    "Gate",
    "GateOptions",
    "Gates",
    "Routing",
    "SpectR",
    "StaticSearch",
    "StaticWeights",
    "adapter_fingerprint",
    "adapter_names",
    "fuse",
    "gates_for",
    "read_gates",
    "search_static_weights",
    "write_gates",
]
