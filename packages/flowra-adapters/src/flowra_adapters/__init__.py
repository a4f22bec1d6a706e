"""Adapters for any PyTorch model, with the files every reader understands.

An adapter *method* supplies its mathematics (:class:`Adapter`); attaching, merging, resizing and saving exist once,
for every method and layer type. The base model keeps its module names, classes and parameters: an adapter is a child
of the layer it adapts, and its update is added to the layer's output.
"""

from importlib.metadata import version

from flowra_adapters.adapter import Adapter
from flowra_adapters.attach import METHODS, AdapterMethod, adapters, attach, delete, detach, disable, disabled, enable
from flowra_adapters.checkpoint import AdapterCheckpoint, checkpoint_of
from flowra_adapters.layers import in_layout_of, linear_size
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import adaptable_modules, match_modules
from flowra_adapters.merge import merge, merged, unmerge
from flowra_adapters.peft_reader import load_adapter, read_checkpoint
from flowra_adapters.peft_writer import save_adapter, write_checkpoint

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterCheckpoint",
    "AdapterMethod",
    "LoRA",
    "adaptable_modules",
    "adapters",
    "attach",
    "checkpoint_of",
    "delete",
    "detach",
    "disable",
    "disabled",
    "enable",
    "in_layout_of",
    "linear_size",
    "load_adapter",
    "match_modules",
    "merge",
    "merged",
    "read_checkpoint",
    "save_adapter",
    "unmerge",
    "write_checkpoint",
]

__version__ = version("flowra-adapters")
