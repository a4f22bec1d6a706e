"""How much rank, where, and when: budgets, flow gains, rank plans, and refinement while training goes on.

Works on plain values (gains and costs by module name) and, for what happens in training, on any layer that shows its
bottleneck through the small Protocols declared here. ``flowra_allocation.trainer_callback`` needs transformers.
"""

from importlib.metadata import version

from flowra_allocation.adalora import AdaLoRA
from flowra_allocation.bottleneck_gram import BottleneckGram, FlowSpectrum, balance, flow_spectrum, truncate
from flowra_allocation.breathe import Breathe
from flowra_allocation.budget import parse_budget
from flowra_allocation.exact import exact
from flowra_allocation.flexlora import FlexLoRA
from flowra_allocation.flexlora_compat import FlexLoRACompat, rebuilt_optimizer
from flowra_allocation.flexlora_schedule import FlexLoRASchedule
from flowra_allocation.forms import RefinableLayer, SlottedLayer, TripletLayer
from flowra_allocation.greedy import greedy
from flowra_allocation.growth import GradientSketch
from flowra_allocation.hand_over import hand_over
from flowra_allocation.importance import spectral_entropy
from flowra_allocation.knapsack import Allocation
from flowra_allocation.observe import BottleneckObserver
from flowra_allocation.offset_gain import offset_gain
from flowra_allocation.one_shot import harmonic_gains, one_shot_limits, spectral_gains
from flowra_allocation.optimizer_tensors import optimizer_tensors, restore_optimizer
from flowra_allocation.peft_layers import PeftLayer, peft_layers
from flowra_allocation.peft_patterns import PeftPatterns, peft_patterns, plan_for_peft
from flowra_allocation.planning import allocate
from flowra_allocation.policy import Keep, LayerView, Moves, NewTriplets, Policy, Rebasing, RefinementError, Snapshot
from flowra_allocation.rank_history import RankEvent, RankHistory
from flowra_allocation.rank_plan import ModulePlan, RankPlan, mean_rank, read_plan, write_plan
from flowra_allocation.refinement import Refiner
from flowra_allocation.schedule import RefinementSchedule
from flowra_allocation.sensitivity import sensitivity
from flowra_allocation.shrink import Shrink
from flowra_allocation.solvers import SOLVERS, Solver
from flowra_allocation.static_plans import placement_plan, random_plan, uniform_plan
from flowra_allocation.surgery import append, grow, keep, rebase, silence
from flowra_allocation.triplet_sensitivity import TripletSensitivity

__all__ = [
    "SOLVERS",
    "AdaLoRA",
    "Allocation",
    "BottleneckGram",
    "BottleneckObserver",
    "Breathe",
    "FlexLoRA",
    "FlexLoRACompat",
    "FlexLoRASchedule",
    "FlowSpectrum",
    "GradientSketch",
    "Keep",
    "LayerView",
    "ModulePlan",
    "Moves",
    "NewTriplets",
    "PeftLayer",
    "PeftPatterns",
    "Policy",
    "RankEvent",
    "RankHistory",
    "RankPlan",
    "Rebasing",
    "RefinableLayer",
    "RefinementError",
    "RefinementSchedule",
    "Refiner",
    "Shrink",
    "SlottedLayer",
    "Snapshot",
    "Solver",
    "TripletLayer",
    "TripletSensitivity",
    "allocate",
    "append",
    "balance",
    "exact",
    "flow_spectrum",
    "greedy",
    "grow",
    "hand_over",
    "harmonic_gains",
    "keep",
    "mean_rank",
    "offset_gain",
    "one_shot_limits",
    "optimizer_tensors",
    "parse_budget",
    "peft_layers",
    "peft_patterns",
    "placement_plan",
    "plan_for_peft",
    "random_plan",
    "read_plan",
    "rebase",
    "rebuilt_optimizer",
    "restore_optimizer",
    "sensitivity",
    "silence",
    "spectral_entropy",
    "spectral_gains",
    "truncate",
    "uniform_plan",
    "write_plan",
]

__version__ = version("flowra-allocation")
