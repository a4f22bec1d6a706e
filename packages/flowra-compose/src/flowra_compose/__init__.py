"""Many low-rank adapters become one, on the products they stand for: exactly, or of a chosen rank with the loss told.

An adapter is a set of updates ΔW = s · B A, by module (:class:`AdapterState`), read from PEFT's files or built by hand.
A *rule* (:data:`RULES`) says how updates combine; what all rules share, from checks to trained heads and files, exists
once. The result is an ordinary adapter that any reader of PEFT's format loads.
"""

from importlib.metadata import version

from flowra_compose.base_weights import base_weights
from flowra_compose.folders import MergedFolder, merge_folders
from flowra_compose.inflora import start_inflora
from flowra_compose.interference import InterferenceMeter
from flowra_compose.interference_files import read_interference, write_interference
from flowra_compose.interference_report import (
    InterferenceReport,
    MeasuredTask,
    ModuleInterference,
    ModulePair,
    ModuleTask,
    TaskScores,
)
from flowra_compose.learned_coefficients import LearnedCoefficients, learn_coefficients
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.matching import cross_talk, matching_energy, matching_objective
from flowra_compose.memory import ModuleMemory, TaskMemory
from flowra_compose.memory_files import read_task_memory, write_task_memory
from flowra_compose.merge import merge_adapters
from flowra_compose.merging import budget_ranks, merge_updates, merged_modules
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.null_space import NullSpace
from flowra_compose.options import MergeOptions
from flowra_compose.peft_reader import read_adapter
from flowra_compose.peft_writer import write_adapter
from flowra_compose.penalties import kfac_penalty, o_lora_penalty, orthogonality_penalty
from flowra_compose.rank_budget import ranks_within
from flowra_compose.recommendation import Recommendation, recommend
from flowra_compose.rules import RULES, MergeRule
from flowra_compose.sequential_metrics import SequentialMetrics, sequential_metrics
from flowra_compose.singular_vectors import singular_task_interference
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.trained_layers import PeftPair, TrainedPair, peft_pairs
from flowra_compose.truncation import TruncatedUpdate, Truncation, truncated

__all__ = [
    "RULES",
    "AdapterState",
    "InterferenceMeter",
    "InterferenceReport",
    "LearnedCoefficients",
    "LowRankUpdate",
    "MeasuredTask",
    "MergeOptions",
    "MergeRule",
    "MergedFolder",
    "ModuleInterference",
    "ModuleMemory",
    "ModulePair",
    "ModuleStatistics",
    "ModuleTask",
    "ModuleUpdates",
    "NullSpace",
    "PeftPair",
    "Recommendation",
    "SequentialMetrics",
    "TaskMemory",
    "TaskScores",
    "TrainedPair",
    "TruncatedUpdate",
    "Truncation",
    "base_weights",
    "budget_ranks",
    "cross_talk",
    "kfac_penalty",
    "learn_coefficients",
    "matching_energy",
    "matching_objective",
    "merge_adapters",
    "merge_folders",
    "merge_updates",
    "merged_modules",
    "o_lora_penalty",
    "orthogonality_penalty",
    "peft_pairs",
    "ranks_within",
    "read_adapter",
    "read_interference",
    "read_task_memory",
    "recommend",
    "sequential_metrics",
    "singular_task_interference",
    "start_inflora",
    "truncated",
    "write_adapter",
    "write_interference",
    "write_task_memory",
]

__version__ = version("flowra-compose")
