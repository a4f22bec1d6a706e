"""Where does information flow in a network, and where is it redundant?

A model and batches go in, a :class:`FlowProfile` comes out: per module its shape, its cost per unit of rank, statistics
with their standard errors, and spectra. Nothing is asked of the model but that its modules are linear layers,
convolutions or embeddings; its parameters, gradients and modes are left as they were.
"""

from importlib.metadata import version

from flowra_analysis.empirical_fisher import EmpiricalFisher, Estimate, fisher_trace, squared_gradient_norms
from flowra_analysis.flow_profile import FlowProfile, ModuleProfile, read_profile, write_profile
from flowra_analysis.gradient_spectrum import GradientSketch, GradientSpectra, GradientSpectrum, gradient_spectra
from flowra_analysis.kronecker_factors import KroneckerFactors, kronecker_factors
from flowra_analysis.layer_signals import Signals, layer_signals
from flowra_analysis.layer_types import LAYER_TYPES, TypeSummary, layer_type, summarise
from flowra_analysis.layers import is_measurable_layer, weight_matrix
from flowra_analysis.measure import Statistic, measure
from flowra_analysis.per_example_signals import per_example_signals
from flowra_analysis.profile_diff import (
    Change,
    ProfileDiff,
    StatisticDiff,
    diff_profiles,
    rank_correlation,
    spectral_distance,
)
from flowra_analysis.provenance import base_hash, data_hash, provenance_of
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
from flowra_analysis.second_moments import MomentMatrix, SecondMoment

__all__ = [
    "LAYER_TYPES",
    "Change",
    "EmpiricalFisher",
    "Estimate",
    "FlowProfile",
    "GradientSketch",
    "GradientSpectra",
    "GradientSpectrum",
    "KroneckerFactors",
    "ModuleProfile",
    "MomentMatrix",
    "ProfileDiff",
    "SecondMoment",
    "Signals",
    "Statistic",
    "StatisticDiff",
    "TypeSummary",
    "base_hash",
    "data_hash",
    "diff_profiles",
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "fisher_trace",
    "gradient_spectra",
    "is_measurable_layer",
    "kronecker_factors",
    "layer_signals",
    "layer_type",
    "measure",
    "participation_ratio",
    "per_example_signals",
    "profile_weights",
    "provenance_of",
    "rank_correlation",
    "read_profile",
    "redundancy",
    "spectral_distance",
    "squared_gradient_norms",
    "stable_rank",
    "summarise",
    "weight_matrix",
    "weight_spectrum",
    "write_profile",
]

__version__ = version("flowra-analysis")
