"""Many low-rank adapters become one, exactly, on the products they stand for.

An adapter is a set of updates ΔW = s · B A, by module (:class:`AdapterState`), read from PEFT's files or built by hand.
A *rule* (:data:`RULES`) says how updates combine; what all rules share, from checks to trained heads and files, exists
once. The result is an ordinary adapter that any reader of PEFT's format loads.
"""

from importlib.metadata import version

from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.merge import RULES, MergeRule, merge_adapters, merge_folders
from flowra_compose.peft_files import read_adapter, write_adapter

__all__ = [
    # the rules and their seam
    "RULES",
    # values
    "AdapterState",
    "LowRankUpdate",
    "MergeRule",
    # merging
    "merge_adapters",
    "merge_folders",
    # files
    "read_adapter",
    "write_adapter",
]

__version__ = version("flowra-compose")
