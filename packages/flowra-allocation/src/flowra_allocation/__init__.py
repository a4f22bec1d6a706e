"""How much rank, where, and when: budgets, flow gains, rank plans, and refinement while training goes on.

Works on plain values (gains and costs by module name) and, for what happens in training, on any layer that shows its
bottleneck through the small Protocols declared here. ``flowra_allocation.trainer_callback`` needs transformers.
"""

from importlib.metadata import version

from flowra_allocation.bottleneck_gram import BottleneckGram, FlowSpectrum, balance, flow_spectrum, truncate
from flowra_allocation.breathe import Moves, breathe
from flowra_allocation.budget import parse_budget
from flowra_allocation.exact import exact
from flowra_allocation.greedy import greedy
from flowra_allocation.growth import GradientSketch
from flowra_allocation.knapsack import Allocation
from flowra_allocation.observe import BottleneckObserver, ObservableLayer
from flowra_allocation.rank_plan import ModulePlan, RankPlan, allocate, mean_rank, read_plan, write_plan
from flowra_allocation.refinement import RankEvent, RankHistory, RefinableLayer, RefinementSchedule, Refiner
from flowra_allocation.sensitivity import sensitivity
from flowra_allocation.solvers import SOLVERS, Solver
from flowra_allocation.surgery import ResizableLayer, grow, keep, rebase

__all__ = [
    "SOLVERS",
    "Allocation",
    "BottleneckGram",
    "BottleneckObserver",
    "FlowSpectrum",
    "GradientSketch",
    "ModulePlan",
    "Moves",
    "ObservableLayer",
    "RankEvent",
    "RankHistory",
    "RankPlan",
    "RefinableLayer",
    "RefinementSchedule",
    "Refiner",
    "ResizableLayer",
    "Solver",
    "allocate",
    "balance",
    "breathe",
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
    "truncate",
    "write_plan",
]

__version__ = version("flowra-allocation")
