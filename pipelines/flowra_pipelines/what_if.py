"""What a plan would be under another budget, other limits, another solver or other gains; trains nothing."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from flowra_adapters.peft_writer import VLLM_RANKS
from flowra_allocation import (
    SOLVERS,
    RankPlan,
    allocate,
    harmonic_gains,
    one_shot_limits,
    parse_budget,
    read_plan,
    spectral_gains,
)
from flowra_analysis import FlowProfile
from flowra_pipelines.errors import UserError
from flowra_pipelines.module_names import modules_called
from flowra_pipelines.profile_commands import read_profile_at
from flowra_pipelines.rank_limits import CAP_STEPS, check_cap_of_vllm
from flowra_pipelines.same_budget import parameters_of
from flowra_pipelines.static_plans import STATIC, static_plan

__all__ = ["Answer", "Question", "Sources", "Step", "answer", "plan_at", "read_sources"]

FLOW = "flow_gains"
DRAWN = ("uniform", "random")
"""Static plans that a seed decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked; None and nothing leave things as they are."""

    budget: str | None = None
    """Of the run: where its policy starts above it, the plan spends as many times as much as it does now."""
    caps: Sequence[str] = ()
    """``16``, or ``q,v=16``."""
    floors: Sequence[str] = ()
    """``1``, or ``q,v=1``."""
    frozen: Sequence[str] = ()
    """``q,v``, or ``q,v=4``."""
    rank_steps: str | None = None
    """``vllm``, or ranks with commas between."""
    solver: str | None = None
    """By default greedy."""
    threshold: float | None = None
    source: str | None = None
    """A kind of spectrum or a statistic of the profile; by default the plan's own gains."""
    static: str | None = None
    """One of ``static_plans.STATIC``."""
    seed: int | None = None
    """Of what is drawn; by default 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What there is to ask of: a plan, a profile, or both."""

    where: str
    plan: RankPlan | None
    profile: FlowProfile | None
    costs: dict[str, int]
    """Module name to parameters per unit of rank, of those that are planned anew."""
    kept: tuple[str, ...]
    """Modules of the plan whose cost is not in proportion to rank, which a plan does not say at other ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a server whose buffers have one rank pays at that rank."""

    rank: int
    """Of all buffers."""
    parameters: int
    """Of the plan."""
    gain: float
    """Planned by it."""
    unused: int
    """Parameters of the buffers of its modules that stay empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The plan, and what else to know."""

    plan: RankPlan
    notes: tuple[str, ...]
    ladder: tuple[Step, ...] = field(default=())
    """With vLLM's steps: each at which a server could keep its buffers, the present one last."""


def plan_at(path: Path) -> tuple[Path, RankPlan]:
    """Find and read a plan: a ``plan.json``, a folder with one, or a run's folder.

    Returns:
        The file and the plan.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    folder = _folder_with(path, "plan.json", ("", "allocate"))
    if folder is None:
        raise UserError(f"plan must be a plan.json, a folder with one, or a run that has come to allocate, got {path}")
    try:
        return folder / "plan.json", read_plan(folder)
    except OSError as error:
        raise UserError(f"plan must be readable, got {error.strerror} for {folder}") from None
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def read_sources(path: Path) -> Sources:
    """Read the plan and the profile of a run, or the one that is given.

    Returns:
        Both, as far as they are there.

    Raises:
        UserError: if neither is there, one cannot be read, or they are not of the same modules.
    """
    profile_folder = _folder_with(path, "profile.json", ("", "calibrate"))
    plan = plan_at(path)[1] if _folder_with(path, "plan.json", ("", "allocate")) else None
    if plan is None and profile_folder is None:
        raise UserError(f"what-if must ask of a plan.json, a profile.json, a folder with one, or a run, got {path}")
    profile = None if profile_folder is None else read_profile_at(profile_folder)
    if plan is None:
        assert profile is not None
        costs = {name: module.cost_per_rank for name, module in profile.modules.items()}
        return Sources(where=str(path), plan=None, profile=profile, costs=costs, kept=())
    if profile is not None and not plan.modules.keys() <= profile.modules.keys():
        other = sorted(plan.modules.keys() - profile.modules.keys())[0]
        raise UserError(f"plan and profile must be of the same modules, got {other!r} in the plan only; in {path}")
    kept = tuple(name for name, module in plan.modules.items() if module.parameters is not None)
    costs = {name: module.cost_per_rank for name, module in plan.modules.items() if name not in kept}
    return Sources(where=str(path), plan=plan, profile=profile, costs=costs, kept=kept)


def answer(sources: Sources, question: Question) -> Answer:
    """Plan again.

    Returns:
        The plan, with notes on what was assumed.

    Raises:
        UserError: if the question cannot be asked of this plan or profile.
    """
    try:
        found = _static(sources, question) if question.static else _allocated(sources, question)
        return _with_final_budget(sources, question, found)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _allocated(sources: Sources, question: Question) -> Answer:
    if question.solver not in (None, *SOLVERS):
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {question.solver!r}")
    if question.seed is not None:
        raise UserError(f"--seed has no effect without --static uniform or random, got {question.seed}")
    solver: Literal["greedy", "exact"] = "exact" if question.solver == "exact" else "greedy"
    budget = _budget(sources, question.budget)
    gains, one_shot = _gains(sources, question.source)
    caps, floors = _ranks(sources, question.caps, "cap"), _ranks(sources, question.floors, "floor")
    notes = []
    if one_shot and question.rank_steps is None:  # steps are limits of their own
        floor, cap = one_shot_limits(sources.costs, budget=budget)
        caps, floors = cap if caps is None else caps, floor if floors is None else floors
        notes.append(
            f"{question.source} was not measured on a learned update, so unless you say otherwise ranks stay between"
            f" {floor} and {cap}, near the uniform rank."
        )
    vllm = question.rank_steps == "vllm"
    if vllm and isinstance(caps, int):
        check_cap_of_vllm(caps, what="cap", instead="leave --rank-steps out")

    def solved(cap: int | Mapping[str, int] | None, cap_steps: Sequence[int] | None) -> RankPlan:
        return allocate(
            gains,
            sources.costs,
            budget=budget,
            sensitivity_threshold=_threshold(sources, question),
            scaling=2.0 if sources.plan is None else sources.plan.scaling,
            solver=solver,
            caps=cap,
            floors=floors,
            frozen=_frozen(sources, question.frozen),
            rank_steps=None if vllm or question.rank_steps is None else _steps(question.rank_steps),
            cap_steps=cap_steps,
            kinds=_kinds(sources),
        )

    plan = solved(caps, CAP_STEPS if vllm else None)
    ladder: list[Step] = []
    if vllm:
        tried = {_buffer_rank(one): one for one in (solved(caps, [rank]) for rank in VLLM_RANKS)}
        ladder = [_step(tried[rank], rank) for rank in sorted(tried)]
        notes.append(
            f"A vLLM server keeps buffers of one rank for all modules: here {_buffer_rank(plan)} (max_lora_rank), the"
            f" largest rank being {max(plan.ranks.values())}."
        )
    return Answer(plan=_with_kept(sources, plan, notes), notes=tuple(notes), ladder=tuple(ladder))


def _static(sources: Sources, question: Question) -> Answer:
    """Plan without a look at gains; what would have no effect is refused."""
    for option, value in {
        "floor": question.floors,
        "freeze": question.frozen,
        "rank-steps": question.rank_steps,
        "from": question.source,
        "threshold": question.threshold,
        "solver": question.solver,
        "seed": None if question.static in DRAWN else question.seed,
    }.items():
        if value not in (None, ()) and value != []:
            raise UserError(f"--{option} has no effect with --static {question.static}")
    if question.static not in STATIC:
        raise UserError(f"static must be one of {'; '.join(STATIC)}, got {question.static!r}")
    budget = _budget(sources, question.budget)
    gains = _gains(sources, None)[0] if _knows_gains(sources) else None
    caps, said = _largest(sources), _ranks(sources, question.caps, "cap")
    if said is not None:
        said = said if isinstance(said, Mapping) else dict.fromkeys(caps, said)
        caps |= {name: min(cap, caps[name]) for name, cap in said.items()}
    plan = static_plan(
        question.static,
        sources.costs,
        budget=budget,
        seed=question.seed or 0,
        caps=caps,
        gains=gains,
        scaling=2.0 if sources.plan is None else sources.plan.scaling,
    )
    kinds = _kinds(sources)
    modules = {name: replace(module, kind=kinds.get(name, module.kind)) for name, module in plan.modules.items()}
    plan = replace(plan, modules=modules)
    notes: list[str] = []
    return Answer(plan=_with_kept(sources, plan, notes), notes=tuple(notes))


# what is read


def _folder_with(path: Path, name: str, places: Sequence[str]) -> Path | None:
    if path.name == name and path.is_file():
        return path.parent
    return next((path / place for place in places if (path / place / name).is_file()), None)


def _gains(sources: Sources, source: str | None) -> tuple[dict[str, list[float]], bool]:
    """Return gains by module, and whether they are of one shot: not measured on a learned update."""
    if source is None and sources.plan is not None and not _has_gains(sources.plan) and not _knows_gains(sources):
        raise UserError(
            f"plan must hold gains, got one that was made without a look at them; in {sources.where}. Ask with"
            " --static, or of a run that was calibrated."
        )
    if source is None and sources.plan is not None and _has_gains(sources.plan):
        return {name: list(sources.plan.modules[name].gains) for name in sources.costs}, False
    kind = source or FLOW
    if sources.profile is None:
        raise UserError(f"--from {kind} needs a profile, got none in {sources.where}. Give the run's folder.")
    profile = sources.profile
    if kind in profile.spectra:
        spectra = {name: each.tolist() for name, each in profile.spectra[kind].items()}
        _require(sources.costs, spectra, kind)
        own = {name: spectra[name] for name in sources.costs}
        return (own, False) if kind == FLOW else (spectral_gains(own), True)
    scores = {name: module.statistics[kind] for name, module in profile.modules.items() if kind in module.statistics}
    if not scores:
        known = sorted({*profile.spectra, *(key for each in profile.modules.values() for key in each.statistics)})
        near = difflib.get_close_matches(kind, known, n=3, cutoff=0.0)
        raise UserError(f"--from must be a spectrum or a statistic of the profile, got {kind!r}; nearest: {near}")
    _require(sources.costs, scores, kind)
    return harmonic_gains({name: scores[name] for name in sources.costs}, _largest(sources)), True


def _largest(sources: Sources) -> dict[str, int]:
    """Return each module's largest rank: that of its weight or, where its shape is not known, that of the probe."""
    if sources.profile is not None:
        return {name: min(sources.profile.modules[name].shape) for name in sources.costs}
    assert sources.plan is not None
    if not _has_gains(sources.plan):
        raise UserError(
            f"largest ranks must be known, got a plan alone that does not say any; {sources.where}. Give the run."
        )
    return {name: len(sources.plan.modules[name].gains) for name in sources.costs}


def _has_gains(plan: RankPlan) -> bool:
    return any(module.gains for module in plan.modules.values())


def _knows_gains(sources: Sources) -> bool:
    measured = sources.profile is not None and FLOW in sources.profile.spectra
    return measured or (sources.plan is not None and _has_gains(sources.plan))


def _require(names: Iterable[str], known: Mapping[str, object], kind: str) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"--from must be known of every module, got {kind!r}, which {missing[0]!r} has not")


def _budget(sources: Sources, text: str | None) -> int:
    """Return what the modules that are planned anew may spend."""
    kept = 0 if sources.plan is None else sum(sources.plan.modules[name].used for name in sources.kept)
    if text is not None:
        if sources.profile is None and text.strip().endswith("%"):
            raise UserError(f"budget in per cent needs the base's size, got {text!r} for a plan alone. Give the run.")
        base = 1 if sources.profile is None else sources.profile.base_parameters
        found = parse_budget(
            text,
            base_parameters=base,
            unit_cost=lambda names: sum(sources.costs[name] for name in modules_called(sources.costs, names, "budget")),
            parameters_of=parameters_of,
        )
        found = int(_factor(sources) * found)
    elif sources.plan is not None:
        found = sources.plan.budget
    else:
        assert sources.profile is not None
        known = sources.profile.provenance.get("budget_parameters")
        if not isinstance(known, int):
            raise UserError("budget must be given, since the profile does not say one. Add --budget.")
        found = known
    if found < kept:
        raise UserError(f"budget must be at least the {kept} parameters of the modules that are kept, got {found}")
    return found - kept


def _factor(sources: Sources) -> Fraction:
    """Return what the plan spends as a multiple of what refinement ends within, with the fewest digits that give it."""
    if sources.plan is None or not sources.plan.final_budget:
        return Fraction(1)
    spent, final = sources.plan.budget, sources.plan.final_budget
    rounded = (Fraction(math.ceil(Fraction(spent * 10**digits, final)), 10**digits) for digits in range(6))
    return next((each for each in rounded if int(each * final) == spent), Fraction(spent, final))


def _with_final_budget(sources: Sources, question: Question, found: Answer) -> Answer:
    """Say what refinement ends within, where that is not what the plan spends."""
    if sources.plan is None or sources.plan.final_budget is None:
        return found
    factor, final = _factor(sources), sources.plan.final_budget
    if question.budget is not None:
        final = math.ceil(found.plan.budget / factor)
    return replace(found, plan=replace(found.plan, final_budget=final))


def _threshold(sources: Sources, question: Question) -> float:
    if question.threshold is not None:
        return question.threshold
    return 0.05 if sources.plan is None else sources.plan.sensitivity_threshold


def _kinds(sources: Sources) -> dict[str, str]:
    return {} if sources.plan is None else {name: sources.plan.modules[name].kind for name in sources.costs}


def _with_kept(sources: Sources, plan: RankPlan, notes: list[str]) -> RankPlan:
    """Put the modules back whose cost at other ranks is not known, in the plan's order."""
    if sources.plan is None or not sources.kept:
        return plan
    notes.append(f"{len(sources.kept)} modules are kept: their cost at other ranks is not in the plan.")
    old = sources.plan.modules
    modules = {name: old[name] if name in sources.kept else plan.modules[name] for name in old}
    used = sum(old[name].used for name in sources.kept)
    return replace(plan, modules=modules, budget=plan.budget + used, parameters=plan.parameters + used)


# what options mean


def _ranks(sources: Sources, given: Sequence[str], option: str) -> int | dict[str, int] | None:
    """Read ``16`` and ``q,v=8``; what names modules comes before what names none, the last before the first."""
    everywhere: int | None = None
    by_name: dict[str, int] = {}
    for text in given:
        names, _, rank = text.rpartition("=")
        if not rank.strip().isascii() or not rank.strip().isdigit():
            raise UserError(f"--{option} must be a rank, or names=rank, got {text!r}. Example: --{option} q,v=8")
        if names:
            by_name |= dict.fromkeys(modules_called(sources.costs, names.split(","), option), int(rank))
        else:
            everywhere = int(rank)
    if not by_name:
        return everywhere
    return by_name if everywhere is None else {**dict.fromkeys(sources.costs, everywhere), **by_name}


def _frozen(sources: Sources, given: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in given:
        names, equals, rank = text.partition("=")
        called = modules_called(sources.costs, names.split(","), "freeze")
        if equals:
            if not rank.strip().isascii() or not rank.strip().isdigit():
                raise UserError(f"--freeze must be names, or names=rank, got {text!r}. Example: --freeze q,v=4")
            found |= dict.fromkeys(called, int(rank))
        elif sources.plan is None:
            raise UserError(f"--freeze without a rank needs a plan, got a profile only. Say --freeze {text}=4.")
        else:
            found |= {name: sources.plan.modules[name].rank for name in called}
    return found


def _steps(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--rank-steps must be vllm, or ranks ≥ 1 with commas between, got {text!r}. Example: 4,8,16")
    return [int(part) for part in parts]


# vLLM's buffers


def _buffer_rank(plan: RankPlan) -> int:
    largest = max(plan.ranks.values())
    return next((step for step in VLLM_RANKS if step >= largest), largest)


def _step(plan: RankPlan, rank: int) -> Step:
    held = sum(rank * module.cost_per_rank for module in plan.modules.values() if module.rank)
    gain = sum(sum(module.gains[: module.rank]) for module in plan.modules.values())
    return Step(rank=rank, parameters=plan.parameters, gain=gain, unused=held - plan.parameters)
