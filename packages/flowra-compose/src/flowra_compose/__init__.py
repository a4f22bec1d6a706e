"""Many low-rank adapters become one, on the products they stand for: exactly, or of a chosen rank with the loss told.

An adapter is a set of updates ΔW = s · B A, by module (:class:`AdapterState`), read from PEFT's files or built by hand.
A *rule* (:data:`RULES`) says how updates combine; what all rules share, from checks to trained heads and files, exists
once. The result is an ordinary adapter that any reader of PEFT's format loads.
"""

from importlib.metadata import version

from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.merge import RULES, MergeRule, merge_adapters, merge_folders
from flowra_compose.peft_files import read_adapter, write_adapter
from flowra_compose.truncated_svd import TruncatedUpdate, truncated_svd

__all__ = [
    "RULES",
    "AdapterState",
    "LowRankUpdate",
    "MergeRule",
    "TruncatedUpdate",
    "merge_adapters",
    "merge_folders",
    "read_adapter",
    "truncated_svd",
    "write_adapter",
]

__version__ = version("flowra-compose")
