"""Where does information flow in a network, and where is it redundant?

A model and batches go in, a :class:`FlowProfile` comes out: per module its shape, its cost per unit of rank, statistics
with their standard errors, and spectra. Nothing is asked of the model but that its modules are ``nn.Linear``; its
parameters, gradients and modes are left as they were.
"""

from importlib.metadata import version

from flowra_analysis.empirical_fisher import EmpiricalFisher, Estimate, fisher_trace, squared_gradient_norms
from flowra_analysis.flow_profile import FlowProfile, ModuleProfile, read_profile, write_profile
from flowra_analysis.layer_signals import layer_signals
from flowra_analysis.rank_measures import (
    effective_rank,
    effective_rank_energy,
    energy_rank,
    participation_ratio,
    profile_weights,
    redundancy,
    stable_rank,
    weight_spectrum,
)

__all__ = [
    # sensitivity of the loss
    "EmpiricalFisher",
    "Estimate",
    # the profile and its files
    "FlowProfile",
    "ModuleProfile",
    # how full a spectrum is
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "fisher_trace",
    # what passes through a layer
    "layer_signals",
    "participation_ratio",
    "profile_weights",
    "read_profile",
    "redundancy",
    "squared_gradient_norms",
    "stable_rank",
    "weight_spectrum",
    "write_profile",
]

__version__ = version("flowra-analysis")
