import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowra_compose import (
    RULES,
    AdapterState,
    LowRankUpdate,
    MergeOptions,
    TruncatedUpdate,
    Truncation,
    merge_adapters,
    merge_folders,
    read_adapter,
    write_adapter,
)

HEAD = torch.arange(6.0).reshape(2, 3)


def adapter(
    seed: int = 0,
    *,
    name: str = "fc",
    out: int = 3,
    head: Tensor | None = None,
    base: str | None = None,
    task: str = "",
) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    update = LowRankUpdate(torch.randn(2, 4, generator=generator), torch.randn(out, 2, generator=generator), 2.0)
    return AdapterState(
        updates={name: update},
        modules_to_save={} if head is None else {"head.weight": head},
        base_model_name_or_path=base,
        task_type=task or None,
    )


def test_partly_overlapping_targets_are_united() -> None:
    first, second = adapter(0), adapter(1, name="other", out=5)
    merged = merge_adapters([first, second], [0.5, 2])
    assert set(merged.updates) == {"fc", "other"}
    torch.testing.assert_close(merged.updates["fc"].delta_weight(), 0.5 * first.updates["fc"].delta_weight())
    torch.testing.assert_close(merged.updates["other"].delta_weight(), 2 * second.updates["other"].delta_weight())


def test_merge_of_one_keeps_everything_else() -> None:
    one = adapter(head=HEAD, base="roberta-base", task="SEQ_CLS")
    merged = merge_adapters([one], [1])
    assert torch.equal(merged.modules_to_save["head.weight"], HEAD)
    assert (merged.base_model_name_or_path, merged.task_type) == ("roberta-base", "SEQ_CLS")
    assert merged.trained_modules == ("head",)


def test_rules_cannot_be_changed_from_outside() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        RULES["mine"] = RULES["cat"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights must be one for each adapter, at least one, got 1 for 2"),
        ([1.0, float("nan")], r"weights must be finite numbers, got nan for adapters\[1\]"),
        ([float("inf"), 1.0], r"weights must be finite numbers, got inf for adapters\[0\]"),
    ],
    ids=["count", "nan", "inf"],
)
def test_weights_out_of_range_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_adapters([adapter(0), adapter(1)], weights)


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one, got 0 for 0"):
        merge_adapters([], [])


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of \['cat', .*\], got 'cats'\. Nearest: 'cat'"):
        merge_adapters([adapter()], [1], rule="cats")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("option", [each.name for each in dataclasses.fields(MergeOptions)])
def test_an_option_that_the_rule_ignores_is_refused(rule: str, option: str, tmp_path: Path) -> None:
    if option in RULES[rule].options:
        return
    options = MergeOptions(**{option: "global" if option == "trim" else 1})
    message = f"{option} must be left out with the rule '{rule}', got "
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_adapters([adapter()], [1], rule=rule, options=options)
    write_adapter(adapter(), tmp_path / "a")
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_folders([tmp_path / "a"], [1], tmp_path / "out", rule=rule, options=options)
    assert not (tmp_path / "out").exists()


def test_a_truncation_says_what_was_lost(tmp_path: Path) -> None:
    inputs, weights = [adapter(0), adapter(1)], [0.5, -2.0]
    truncation = Truncation(rank=2, energy=0.9)
    merged = merge_adapters(inputs, weights, truncation=truncation).updates["fc"]
    named = merge_adapters(inputs, weights, rule="truncated_svd", truncation=truncation).updates["fc"]
    exact = merge_adapters(inputs, weights).updates["fc"]
    assert isinstance(merged, TruncatedUpdate)
    assert torch.equal(merged.delta_weight(), named.delta_weight())
    lost = float((exact.delta_weight() - merged.delta_weight()).square().sum())
    assert merged.loss == pytest.approx(lost, rel=1e-5)
    assert merged.loss > 0
    for name, one in zip("ab", inputs, strict=True):
        write_adapter(one, tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    from_files = merge_folders(folders, weights, tmp_path / "out", truncation=Truncation(rank={"fc": 1}))
    assert from_files.updates["fc"].rank == read_adapter(tmp_path / "out").updates["fc"].rank == 1


def test_a_rule_that_is_nothing_without_a_truncation_says_so() -> None:
    with pytest.raises(ValueError, match="truncation must be given with the rule 'truncated_svd', got none"):
        merge_adapters([adapter()], [1], rule="truncated_svd")


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_transposed_storage_of_any_input_is_passed_on(first: bool, second: bool) -> None:
    inputs = [dataclasses.replace(adapter(seed), fan_in_fan_out=each) for seed, each in enumerate((first, second))]
    merged = merge_adapters(inputs, [1, 1])
    assert merged.fan_in_fan_out is (first or second)
    plain = merge_adapters([adapter(0), adapter(1)], [1, 1])
    assert torch.equal(merged.updates["fc"].delta_weight(), plain.updates["fc"].delta_weight())


def test_shapes_that_disagree_name_both_inputs() -> None:
    with pytest.raises(
        ValueError, match=r"linear \(3, 4\) in adapters\[0\] and linear \(5, 4\) in adapters\[2\] for 'fc'"
    ):
        merge_adapters([adapter(0), adapter(1), adapter(2, out=5)], [1, 1, 0])


def test_devices_that_disagree_are_refused() -> None:
    far = AdapterState(updates={"other": LowRankUpdate.__new__(LowRankUpdate)})
    values = {"lora_A": torch.empty(1, 4, device="meta"), "lora_B": torch.ones(3, 1), "layout": "linear", "kernel": ()}
    for field, value in values.items():
        object.__setattr__(far.updates["other"], field, value)
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        merge_adapters([adapter(), far], [1, 1])


def test_bases_that_disagree_name_both() -> None:
    inputs = [adapter(0, base="gpt2"), adapter(1), adapter(2, base="bert")]
    with pytest.raises(ValueError, match=r"'gpt2' in adapters\[0\] and 'bert' in adapters\[2\]"):
        merge_adapters(inputs, [1, 1, 1])
    assert merge_adapters(inputs[:2][::-1], [1, 1]).base_model_name_or_path == "gpt2"


def test_task_types_that_disagree_are_refused_unless_a_head_decides() -> None:
    one, other = adapter(0, task="CAUSAL_LM"), adapter(1, task="SEQ_CLS")
    with pytest.raises(ValueError, match=r"task_type must be the same in all adapters, got 'CAUSAL_LM' in"):
        merge_adapters([one, other], [1, 1])
    assert merge_adapters([one, adapter(1, head=HEAD, task="SEQ_CLS")], [1, 1]).task_type == "SEQ_CLS"


@pytest.mark.parametrize("second", [None, HEAD.clone()], ids=["one-carrier", "equal"])
def test_heads_of_one_or_equal_ones_are_kept(second: Tensor | None) -> None:
    merged = merge_adapters([adapter(0, head=second), adapter(1, head=HEAD)], [1, 0])
    assert torch.equal(merged.modules_to_save["head.weight"], HEAD)


@pytest.mark.parametrize(
    "other",
    [HEAD + 1e-6, HEAD.double(), HEAD.T, HEAD * torch.tensor([[-1.0], [1.0]])],
    ids=["value", "dtype", "shape", "sign"],
)
def test_different_heads_need_a_choice(other: Tensor) -> None:
    inputs = [adapter(0, head=HEAD), adapter(1), adapter(2, head=other)]
    message = r"different \['head\.weight'\] in 0 \(adapters\[0\]\), 2 \(adapters\[2\]\)\. Give heads_from=<index>"
    with pytest.raises(ValueError, match=message):
        merge_adapters(inputs, [1, 1, 1])
    assert torch.equal(merge_adapters(inputs, [1, 1, 1], heads_from=2).modules_to_save["head.weight"], other)


@pytest.mark.parametrize("index", [1, 2, -1])
def test_heads_from_must_be_an_input_with_heads(index: int) -> None:
    with pytest.raises(ValueError, match=rf"heads_from must be an adapter with modules_to_save, of \[0\], got {index}"):
        merge_adapters([adapter(0, head=HEAD), adapter(1)], [1, 1], heads_from=index)


def test_a_head_on_a_module_that_another_input_adapts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got both: \['head'\]"):
        merge_adapters([adapter(0, head=HEAD), adapter(1, name="head")], [1, 1])


def test_folders_merge_to_a_folder(tmp_path: Path) -> None:
    inputs = [adapter(0), adapter(1, head=HEAD)]
    for name, one in zip("ab", inputs, strict=True):
        write_adapter(one, tmp_path / name)
    merged = merge_folders([tmp_path / "a", tmp_path / "b"], [0.5, -1], tmp_path / "out", rule="cat", heads_from=1)
    expected = merge_adapters(inputs, [0.5, -1]).updates["fc"].delta_weight()
    written = read_adapter(tmp_path / "out")
    assert torch.equal(written.updates["fc"].delta_weight(), merged.updates["fc"].delta_weight())
    torch.testing.assert_close(written.updates["fc"].delta_weight(), expected)
    assert torch.equal(written.modules_to_save["head.weight"], HEAD)


def test_a_failed_merge_names_the_folders_and_writes_nothing(tmp_path: Path) -> None:
    write_adapter(adapter(0), tmp_path / "a")
    write_adapter(adapter(1, out=5), tmp_path / "b")
    with pytest.raises(ValueError, match=r"linear \(3, 4\) in .*/a and linear \(5, 4\) in .*/b for 'fc'"):
        merge_folders([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "out")
    with pytest.raises(ValueError, match="Was every weight 0"):
        merge_folders([tmp_path / "a"], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    write_adapter(adapter(0), tmp_path / "a")
    with pytest.raises(ValueError, match="out must be a folder of its own"):
        merge_folders([tmp_path / "a"], [1], tmp_path / "b" / ".." / "a")
