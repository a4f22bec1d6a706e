"""Adapters for any PyTorch model, with the files every reader understands.

An adapter *method* supplies its mathematics (:class:`Adapter`); attaching, merging, resizing and saving exist once,
for every method and layer type. The base model keeps its module names, classes and parameters: an adapter is a child
of the layer it adapts, and its update is added to the layer's output.
"""

from importlib.metadata import version

from flowra_adapters.adapter import Adapter, Base
from flowra_adapters.attach import adapters, attach, delete, detach, disable, disabled, enable
from flowra_adapters.attach_plan import PlanEntry, attach_plan
from flowra_adapters.checkpoint import AdapterCheckpoint
from flowra_adapters.compaction import compact
from flowra_adapters.convert import Converted, to_lora
from flowra_adapters.dora import DoRA
from flowra_adapters.gathering import checkpoint_of
from flowra_adapters.initialise import INITIALISATIONS, initialise
from flowra_adapters.input_pca import InputPCA, eva_ranks
from flowra_adapters.kohya import load_kohya, save_kohya
from flowra_adapters.layers import linear_size
from flowra_adapters.loading import attach_checkpoint, load_adapter
from flowra_adapters.lora import LoRA
from flowra_adapters.loralib import from_loralib
from flowra_adapters.matching import adaptable_modules, adaptable_sites, match_modules, match_sites
from flowra_adapters.merge import MergeReport, merge, merged, unmerge
from flowra_adapters.methods import METHODS, AdapterMethod, instead_of
from flowra_adapters.offset import ParameterOffset, create_missing_biases
from flowra_adapters.operators import (
    ConvOperator,
    EmbeddingOperator,
    LinearOperator,
    Operator,
    ParameterOperator,
    operator_of,
)
from flowra_adapters.orthogonality import orthogonality
from flowra_adapters.peft_reader import read_checkpoint
from flowra_adapters.peft_writer import write_checkpoint
from flowra_adapters.quantised import dequantised_weight
from flowra_adapters.rank_steps import pad_ranks
from flowra_adapters.saving import save_adapter
from flowra_adapters.sites import Site, sites
from flowra_adapters.svd import SVDForm
from flowra_adapters.svd_masked import MaskedSVDForm
from flowra_adapters.tucker import Tucker
from flowra_adapters.tucker_ranks import TuckerRanks

__all__ = [
    "INITIALISATIONS",
    "METHODS",
    "Adapter",
    "AdapterCheckpoint",
    "AdapterMethod",
    "Base",
    "ConvOperator",
    "Converted",
    "DoRA",
    "EmbeddingOperator",
    "InputPCA",
    "LinearOperator",
    "LoRA",
    "MaskedSVDForm",
    "MergeReport",
    "Operator",
    "ParameterOffset",
    "ParameterOperator",
    "PlanEntry",
    "SVDForm",
    "Site",
    "Tucker",
    "TuckerRanks",
    "adaptable_modules",
    "adaptable_sites",
    "adapters",
    "attach",
    "attach_checkpoint",
    "attach_plan",
    "checkpoint_of",
    "compact",
    "create_missing_biases",
    "delete",
    "dequantised_weight",
    "detach",
    "disable",
    "disabled",
    "enable",
    "eva_ranks",
    "from_loralib",
    "initialise",
    "instead_of",
    "linear_size",
    "load_adapter",
    "load_kohya",
    "match_modules",
    "match_sites",
    "merge",
    "merged",
    "operator_of",
    "orthogonality",
    "pad_ranks",
    "read_checkpoint",
    "save_adapter",
    "save_kohya",
    "sites",
    "to_lora",
    "unmerge",
    "write_checkpoint",
]

__version__ = version("flowra-adapters")
