"""Where does information flow in a network, and where is it redundant?

A model and batches go in, a :class:`FlowProfile` comes out: per module its shape, its cost per unit of rank, statistics
with their standard errors, and spectra. Nothing is asked of the model but that its modules are linear layers,
convolutions or embeddings; its parameters, gradients and modes are left as they were.
"""

from importlib.metadata import version

from flowra_analysis.across_processes import merged_over_processes
from flowra_analysis.activation_spectra import ActivationSpectra, ActivationSpectrum
from flowra_analysis.block_jacobians import (
    BlockJacobian,
    BlockJacobians,
    JacobianNorms,
    block_jacobians,
    find_blocks,
    jacobian_norms,
    per_example_jacobian_norms,
)
from flowra_analysis.diagonal_fisher import DiagonalFisher, FisherDiagonal
from flowra_analysis.ekfac import EKFAC, EigenFactors
from flowra_analysis.empirical_fisher import EmpiricalFisher, Estimate, fisher_trace, squared_gradient_norms
from flowra_analysis.flow_profile import FlowProfile, ModuleProfile, read_profile, write_profile
from flowra_analysis.flow_spectrum import (
    KFACGradientSpectrum,
    MeanGradients,
    kfac_gradient_spectra,
    kfac_gradient_spectrum,
)
from flowra_analysis.gradient_spectrum import GradientSketch, GradientSpectra, GradientSpectrum, gradient_spectra
from flowra_analysis.hessian import Eigenvalue, HessianProducts, largest_eigenvalue, per_example_gradients
from flowra_analysis.jacobian_products import JacobianProducts
from flowra_analysis.kfac import KFAC, kronecker_factors
from flowra_analysis.kronecker_factors import DampedFactors, KroneckerFactors
from flowra_analysis.label_sampling import drawn_class_losses, drawn_target_losses, drawn_token_losses
from flowra_analysis.layer_signals import Signals, layer_signals
from flowra_analysis.layer_types import LAYER_TYPES, TypeSummary, layer_type, summarise
from flowra_analysis.layers import is_measurable_layer, weight_matrix
from flowra_analysis.learning_rate import LearningRate, propose_learning_rate
from flowra_analysis.measure import Statistic, measure
from flowra_analysis.moment_matrix import DampedMoment, MomentMatrix
from flowra_analysis.per_example_signals import per_example_signals
from flowra_analysis.power_iteration import PowerIteration, power_iteration
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
    leading_weight_spectrum,
    participation_ratio,
    profile_weights,
    redundancy,
    spectrum_decay,
    spectrum_statistics,
    stable_rank,
    update_spectrum,
    weight_spectrum,
)
from flowra_analysis.second_moments import SecondMoment
from flowra_analysis.state_files import read_state, write_state
from flowra_analysis.subspace_alignment import (
    Alignment,
    AlignmentHistory,
    PhaseSummary,
    orthonormal_basis,
    subspace_alignment,
    subspace_overlap,
)
from flowra_analysis.trace_estimators import (
    TraceEstimate,
    hutch_plus_plus_trace,
    hutchinson_trace,
    squared_jacobian_norms,
)

__all__ = [
    "EKFAC",
    "KFAC",
    "LAYER_TYPES",
    "ActivationSpectra",
    "ActivationSpectrum",
    "Alignment",
    "AlignmentHistory",
    "BlockJacobian",
    "BlockJacobians",
    "Change",
    "DampedFactors",
    "DampedMoment",
    "DiagonalFisher",
    "EigenFactors",
    "Eigenvalue",
    "EmpiricalFisher",
    "Estimate",
    "FisherDiagonal",
    "FlowProfile",
    "GradientSketch",
    "GradientSpectra",
    "GradientSpectrum",
    "HessianProducts",
    "JacobianNorms",
    "JacobianProducts",
    "KFACGradientSpectrum",
    "KroneckerFactors",
    "LearningRate",
    "MeanGradients",
    "ModuleProfile",
    "MomentMatrix",
    "PhaseSummary",
    "PowerIteration",
    "ProfileDiff",
    "SecondMoment",
    "Signals",
    "Statistic",
    "StatisticDiff",
    "TraceEstimate",
    "TypeSummary",
    "base_hash",
    "block_jacobians",
    "data_hash",
    "diff_profiles",
    "drawn_class_losses",
    "drawn_target_losses",
    "drawn_token_losses",
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "find_blocks",
    "fisher_trace",
    "gradient_spectra",
    "hutch_plus_plus_trace",
    "hutchinson_trace",
    "is_measurable_layer",
    "jacobian_norms",
    "kfac_gradient_spectra",
    "kfac_gradient_spectrum",
    "kronecker_factors",
    "largest_eigenvalue",
    "layer_signals",
    "layer_type",
    "leading_weight_spectrum",
    "measure",
    "merged_over_processes",
    "orthonormal_basis",
    "participation_ratio",
    "per_example_gradients",
    "per_example_jacobian_norms",
    "per_example_signals",
    "power_iteration",
    "profile_weights",
    "propose_learning_rate",
    "provenance_of",
    "rank_correlation",
    "read_profile",
    "read_state",
    "redundancy",
    "spectral_distance",
    "spectrum_decay",
    "spectrum_statistics",
    "squared_gradient_norms",
    "squared_jacobian_norms",
    "stable_rank",
    "subspace_alignment",
    "subspace_overlap",
    "summarise",
    "update_spectrum",
    "weight_matrix",
    "weight_spectrum",
    "write_profile",
    "write_state",
]

__version__ = version("flowra-analysis")
