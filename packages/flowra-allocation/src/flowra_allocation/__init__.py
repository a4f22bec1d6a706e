"""How much rank, where, and when: budgets, flow gains, rank plans, and refinement while training goes on.

Works on plain values (gains and costs by module name) and, for what happens in training, on any layer that shows its
bottleneck through the small Protocols declared here. ``flowra_allocation.trainer_callback`` needs transformers.
"""

from importlib.metadata import version

from flowra_allocation.bottleneck_gram import BottleneckGram, FlowSpectrum, balance, flow_spectrum, truncate
from flowra_allocation.breathe import Breathe
from flowra_allocation.budget import parse_budget
from flowra_allocation.exact import exact
from flowra_allocation.forms import RefinableLayer, SlottedLayer, TripletLayer
from flowra_allocation.greedy import greedy
from flowra_allocation.growth import GradientSketch
from flowra_allocation.knapsack import Allocation
from flowra_allocation.observe import BottleneckObserver
from flowra_allocation.policy import Keep, LayerView, Moves, Policy, Rebasing, Snapshot
from flowra_allocation.rank_history import RankEvent, RankHistory
from flowra_allocation.rank_plan import ModulePlan, RankPlan, allocate, mean_rank, read_plan, write_plan
from flowra_allocation.refinement import Refiner
from flowra_allocation.schedule import RefinementSchedule
from flowra_allocation.sensitivity import sensitivity
from flowra_allocation.solvers import SOLVERS, Solver
from flowra_allocation.surgery import grow, keep, rebase, silence

__all__ = [
    "SOLVERS",
    "Allocation",
    "BottleneckGram",
    "BottleneckObserver",
    "Breathe",
    "FlowSpectrum",
    "GradientSketch",
    "Keep",
    "LayerView",
    "ModulePlan",
    "Moves",
    "Policy",
    "RankEvent",
    "RankHistory",
    "RankPlan",
    "Rebasing",
    "RefinableLayer",
    "RefinementSchedule",
    "Refiner",
    "SlottedLayer",
    "Snapshot",
    "Solver",
    "TripletLayer",
    "allocate",
    "balance",
    "exact",
    "flow_spectrum",
    "greedy",
    "grow",
    "keep",
    "mean_rank",
    "parse_budget",
    "read_plan",
    "rebase",
    "sensitivity",
    "silence",
    "truncate",
    "write_plan",
]

__version__ = version("flowra-allocation")
