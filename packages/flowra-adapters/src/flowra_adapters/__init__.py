"""Adapters for any PyTorch model, with the files every reader understands.

An adapter *method* supplies its mathematics (:class:`Adapter`); attaching, merging, resizing and saving exist once,
for every method and layer type. The base model keeps its module names, classes and parameters: an adapter is a child
of the layer it adapts, and its update is added to the layer's output.
"""

from importlib.metadata import version

from flowra_adapters.adapter import Adapter, Base
from flowra_adapters.attach import adapters, attach, delete, detach, disable, disabled, enable
from flowra_adapters.checkpoint import AdapterCheckpoint, checkpoint_of
from flowra_adapters.initialise import INITIALISATIONS, initialise
from flowra_adapters.input_pca import InputPCA, eva_ranks
from flowra_adapters.layers import linear_size
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import adaptable_modules, adaptable_sites, match_modules, match_sites
from flowra_adapters.merge import merge, merged, unmerge
from flowra_adapters.methods import METHODS, AdapterMethod
from flowra_adapters.operators import (
    ConvOperator,
    EmbeddingOperator,
    LinearOperator,
    Operator,
    ParameterOperator,
    operator_of,
)
from flowra_adapters.peft_reader import load_adapter, read_checkpoint
from flowra_adapters.peft_writer import save_adapter, write_checkpoint
from flowra_adapters.sites import Site, sites

__all__ = [
    "INITIALISATIONS",
    "METHODS",
    "Adapter",
    "AdapterCheckpoint",
    "AdapterMethod",
    "Base",
    "ConvOperator",
    "EmbeddingOperator",
    "InputPCA",
    "LinearOperator",
    "LoRA",
    "Operator",
    "ParameterOperator",
    "Site",
    "adaptable_modules",
    "adaptable_sites",
    "adapters",
    "attach",
    "checkpoint_of",
    "delete",
    "detach",
    "disable",
    "disabled",
    "enable",
    "eva_ranks",
    "initialise",
    "linear_size",
    "load_adapter",
    "match_modules",
    "match_sites",
    "merge",
    "merged",
    "operator_of",
    "read_checkpoint",
    "save_adapter",
    "sites",
    "unmerge",
    "write_checkpoint",
]

__version__ = version("flowra-adapters")
