"""What PEFT is told, read as PEFT reads it; PEFT itself is the judge in ``tests/integration``."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import ModulePlan, PeftPatterns, RankPlan, peft_patterns, plan_for_peft

NAMES = ["q", "x.q", "y.x.q", "y.xq", "layers.1.q", "layers.11.q", "a-b.c", "layersX1.q"]


def first_match(pattern: dict[str, float], default: float, name: str) -> float:
    """PEFT's rule: the first key that matches the end of a name, or the global value."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def targeted(targets: list[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{each}") for each in targets)


def plan_of(ranks: dict[str, int], *, kind: str = "lora", scaling: float = 2.0) -> RankPlan:
    modules = {
        name: ModulePlan(
            kind=kind, rank=rank, alpha=scaling * rank, cost_per_rank=10, psi=0.5, gains=tuple(1.0 for _ in range(rank))
        )
        for name, rank in ranks.items()
    }
    used = sum(module.used for module in modules.values())
    return RankPlan(modules=modules, budget=used, parameters=used, scaling=scaling, sensitivity_threshold=0.0)


@given(
    ranks=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3), min_size=1).filter(
        lambda each: any(each.values())
    ),
    scalings=st.lists(st.sampled_from([0.5, 2.0, -1 / 3]), min_size=len(NAMES), max_size=len(NAMES)),
    use_rslora=st.booleans(),
)
def test_each_module_gets_its_rank_and_its_scaling_and_no_other_module_is_a_target(
    ranks: dict[str, int], scalings: list[float], use_rslora: bool
) -> None:
    by_name = dict(zip(NAMES, scalings, strict=True))
    fields = peft_patterns(ranks, by_name, use_rslora=use_rslora, others=NAMES)
    for name in NAMES:
        assert targeted(fields.target_modules, name) == (ranks.get(name, 0) > 0)
        if ranks.get(name, 0) > 0:
            r = first_match(dict(fields.rank_pattern), fields.r, name)
            alpha = first_match(fields.alpha_pattern, fields.lora_alpha, name)
            assert r == ranks[name]
            assert alpha / (math.sqrt(r) if use_rslora else r) == pytest.approx(by_name[name], rel=1e-15)


def test_the_global_values_are_those_of_most_modules_and_whole_where_they_can_be() -> None:
    fields = peft_patterns({"a": 2, "b": 2, "c": 8, "d": 0}, dict.fromkeys("abcd", 1.5))
    assert fields == PeftPatterns(
        r=2, lora_alpha=3, rank_pattern={"^c": 8}, alpha_pattern={"^c": 12}, target_modules=["a", "b", "c"]
    )
    assert type(fields.lora_alpha) is int
    assert fields.as_dict().keys() == {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}


def test_targets_are_a_list_unless_a_name_ends_in_another_that_is_not_meant() -> None:
    scalings = dict.fromkeys(NAMES, 1.0)
    assert peft_patterns({"q": 1, "x.q": 1}, scalings).target_modules == ["q", "x.q"]
    assert peft_patterns({"q": 1, "x.q": 0}, scalings).target_modules == "q"
    assert peft_patterns({"q": 1, "layers.1.q": 1}, scalings, others=["x.q"]).target_modules == r"layers\.1\.q|q"


def test_a_plan_is_said_in_peft_s_words() -> None:
    fields = plan_for_peft(plan_of({"a.q": 4, "a.v": 4, "a.o": 1, "a.k": 0}))
    assert fields.as_dict() == {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^a\.o": 1},
        "alpha_pattern": {r"^a\.o": 2},
        "target_modules": ["a.o", "a.q", "a.v"],
    }
    assert plan_for_peft(plan_of({"q": 4}, scaling=2.0), use_rslora=True).lora_alpha == 4  # s · √r


def test_what_peft_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks must be ≥ 1 for at least one module, got \{'a': 0\}"):
        peft_patterns({"a": 0}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"plan must be of lora, or of dora, alone .* got \['svd'\]"):
        plan_for_peft(plan_of({"a": 1}, kind="svd"))
    assert plan_for_peft(plan_of({"a": 1}, kind="dora")).r == 1
