"""A plan names adapter methods: the packages must agree on which there are, and on what they cost."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from flowra_adapters import attach_plan
from flowra_adapters.attach_plan import KINDS as ATTACHED
from flowra_allocation import ModulePlan, RankPlan, read_plan, write_plan
from flowra_allocation.rank_plan import KINDS as PLANNED
from flowra_testing.tiny_models import bert_classifier

SCHEMA = Path(__file__).parents[2] / "docs" / "formats" / "plan.schema.json"
AT = "bert.encoder.layer.0"


def module(kind: str, rank: int, cost: int, parameters: int | None = None) -> ModulePlan:
    return ModulePlan(
        kind=kind, rank=rank, alpha=0.5 * rank, cost_per_rank=cost, psi=1.0, gains=(), parameters=parameters
    )


def plan_of(modules: dict[str, ModulePlan]) -> RankPlan:
    used = sum(each.used for each in modules.values())
    return RankPlan(modules=modules, budget=used, parameters=used, scaling=0.5, sensitivity_threshold=0.0)


def test_planner_attacher_and_schema_know_the_same_kinds() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert set(PLANNED) == set(ATTACHED) == set(schema["$defs"]["module"]["properties"]["kind"]["enum"])


def test_a_plan_of_several_kinds_goes_through_a_file_into_a_model(tmp_path: Path) -> None:
    plan = plan_of({
        f"{AT}.attention.self.query": module("lora", 3, 32),
        f"{AT}.attention.self.key": module("svd", 2, 33),
        f"{AT}.intermediate.dense": module("flora", 2, 49, 2 * 16 + 2 * 32 + 4),
        f"{AT}.output.LayerNorm": module("norm", 1, 16),
        f"{AT}.output.dense.bias": module("bitfit", 1, 16),
    })
    path = write_plan(plan, tmp_path)
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(json.loads(path.read_text()))
    read = read_plan(tmp_path)
    assert read == plan
    attached = attach_plan(bert_classifier(), read.modules, scaling=read.scaling)
    assert {name: one.num_parameters() for name, one in attached.items()} == {
        name: each.used for name, each in read.modules.items()
    }
    assert sum(one.num_parameters() for one in attached.values()) == read.parameters


@pytest.mark.parametrize("parameters", [-1, 0, 1.5, True])
def test_parameters_of_a_module_must_be_possible(parameters: int) -> None:
    with pytest.raises(ValueError, match="parameters must be whole, and 0 where the rank is"):
        module("flora", 2, 49, parameters)


def test_an_unknown_kind_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of lora, .*, got 'magic'"):
        module("magic", 1, 1)
