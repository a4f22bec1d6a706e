"""Many low-rank adapters become one, on the products they stand for: exactly, or of a chosen rank with the loss told.

An adapter is a set of updates ΔW = s · B A, by module (:class:`AdapterState`), read from PEFT's files or built by hand.
A *rule* (:data:`RULES`) says how updates combine; what all rules share, from checks to trained heads and files, exists
once. The result is an ordinary adapter that any reader of PEFT's format loads.
"""

from importlib.metadata import version

from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.merge import merge_adapters, merge_folders
from flowra_compose.merging import merge_updates, merged_modules
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.peft_files import read_adapter, write_adapter
from flowra_compose.rules import RULES, MergeRule
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.truncation import TruncatedUpdate, Truncation, truncated

__all__ = [
    "RULES",
    "AdapterState",
    "LowRankUpdate",
    "MergeOptions",
    "MergeRule",
    "ModuleStatistics",
    "ModuleUpdates",
    "TruncatedUpdate",
    "Truncation",
    "merge_adapters",
    "merge_folders",
    "merge_updates",
    "merged_modules",
    "read_adapter",
    "truncated",
    "write_adapter",
]

__version__ = version("flowra-compose")
