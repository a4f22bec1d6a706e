"""The real peft loads what every rule writes, and the model answers as the base plus the merged products."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from compose.merge_table import ROWS, WEIGHTS, Row, product, random_update, statistics_for
from flowra_compose import RULES, AdapterState, LowRankUpdate, merge_folders, read_adapter, write_adapter
from flowra_testing.tiny_models import batch, bert_classifier, llama_causal_lm, seeded

BERT = "bert.encoder.layer"
LLAMA = "model.layers"
RESNET = "resnet.encoder.stages"


def resnet() -> ResNetForImageClassification:
    """Two stages of one block each, 8 and 16 channels."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    with seeded(0):
        return ResNetForImageClassification(config).eval()


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A model of transformers, what it is asked, and which of its modules three adapters update, with which ranks."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Tensor]]
    ranks: Mapping[str, tuple[int, int, int]]
    """Of each adapter; 0 where it leaves the module alone."""
    task_type: str | None = None
    head: str | None = None
    """A linear layer that was trained in full, the same in all."""

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Answer."""
        found: Tensor = model(**self.inputs()).logits
        return found

    def updates(self, task: int) -> dict[str, LowRankUpdate]:
        """Draw the updates of an adapter, of about the size of the weights."""
        found, base = {}, self.build()
        for index, (name, ranks) in enumerate(self.ranks.items()):
            if ranks[task]:
                like = of_parameter(base, name)
                scaling = 0.05 * (1 + task) / ranks[task]
                drawn = random_update(*like.shape, ranks[task], seed=10 * task + index, scaling=scaling, like=like)
                found[name] = LowRankUpdate(
                    drawn.lora_A.float(), drawn.lora_B.float(), scaling, layout=like.layout, kernel=like.kernel
                )
        return found

    def trained(self) -> dict[str, Tensor]:
        """Draw the tensors of the head."""
        if self.head is None:
            return {}
        generator = torch.Generator().manual_seed(9)
        shapes = self.build().get_submodule(self.head).state_dict()
        return {
            f"{self.head}.{name}": torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()
        }

    def write(self, root: Path) -> list[Path]:
        """Write the three adapters."""
        folders = []
        for task in range(3):
            state = AdapterState(updates=self.updates(task), modules_to_save=self.trained(), task_type=self.task_type)
            folders.append(root / f"task{task}")
            write_adapter(state, folders[-1])
        return folders


def of_parameter(model: nn.Module, name: str) -> LowRankUpdate:
    """Return an update of 0, of the shape and layout of a module's weight, or of a bias by its own name."""
    if name.endswith(".bias"):
        return LowRankUpdate(torch.zeros(1, 1), torch.zeros(len(model.get_parameter(name)), 1), layout="vector")
    module, weight = model.get_submodule(name), model.get_parameter(f"{name}.weight")
    if isinstance(module, nn.Embedding):
        return LowRankUpdate(torch.zeros(1, len(weight)), torch.zeros(weight.shape[1], 1), layout="embedding")
    if isinstance(module, nn.Conv2d):
        a, b = torch.zeros(1, weight[0].numel()), torch.zeros(len(weight), 1)
        return LowRankUpdate(a, b, layout="conv", kernel=module.kernel_size)
    return LowRankUpdate(torch.zeros(1, weight.shape[1]), torch.zeros(len(weight), 1))


CONSUMERS = {
    "bert": Consumer(
        build=bert_classifier,
        inputs=batch,
        ranks={
            f"{BERT}.0.attention.self.query": (2, 3, 1),
            f"{BERT}.1.attention.self.query": (4, 0, 2),
            f"{BERT}.1.intermediate.dense": (0, 1, 3),
            f"{BERT}.0.output.dense": (2, 0, 0),
            f"{BERT}.0.attention.self.query.bias": (1, 1, 0),
        },
        task_type="SEQ_CLS",
        head="classifier",
    ),
    "llama": Consumer(
        build=llama_causal_lm,
        inputs=batch,
        ranks={
            f"{LLAMA}.0.self_attn.q_proj": (4, 2, 3),
            f"{LLAMA}.1.self_attn.v_proj": (1, 5, 0),
            f"{LLAMA}.0.mlp.down_proj": (0, 3, 3),
            f"{LLAMA}.1.mlp.gate_proj": (2, 0, 0),
            "model.embed_tokens": (1, 2, 2),
        },
        task_type="CAUSAL_LM",
    ),
    "resnet": Consumer(
        build=resnet,
        inputs=images,
        ranks={
            f"{RESNET}.0.layers.0.layer.0.convolution": (3, 1, 2),
            f"{RESNET}.1.layers.0.shortcut.convolution": (2, 2, 0),
            f"{RESNET}.1.layers.0.layer.1.convolution": (0, 4, 1),
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return {name: one.write(tmp_path_factory.mktemp(name)) for name, one in CONSUMERS.items()}


@torch.no_grad()
def with_products(consumer: Consumer, merged: AdapterState) -> nn.Module:
    """Return the base with the head and every ΔW added to its parameter."""
    model = consumer.build()
    for name, update in merged.updates.items():
        delta = product(update)
        delta = delta.T if update.layout == "embedding" else delta
        parameter = model.get_parameter(name if update.layout == "vector" else f"{name}.weight")
        parameter += delta.reshape(update.parameter_shape)
    model.load_state_dict(merged.modules_to_save, strict=False)
    return model


@pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param(name, row, id=f"{name}-{row.name}", marks=pytest.mark.exhaustive if row.variant else ())
        for name in CONSUMERS
        for row in ROWS
    ],
)
def test_peft_gives_the_logits_of_the_base_plus_the_product(
    name: str, row: Row, folders: dict[str, list[Path]], tmp_path: Path
) -> None:
    consumer = CONSUMERS[name]
    merged = merge_folders(
        folders[name],
        WEIGHTS,
        tmp_path,
        rule=row.rule,
        options=row.options,
        truncation=row.truncation,
        statistics=statistics_for([read_adapter(each).updates for each in folders[name]])
        if RULES[row.rule].needs
        else None,
    )
    assert merged.updates.keys() >= consumer.ranks.keys()  # where one bias is updated, the file holds zeros of others
    expected = consumer.logits(with_products(consumer, merged))
    loaded = PeftModel.from_pretrained(consumer.build(), tmp_path)
    torch.testing.assert_close(consumer.logits(loaded), expected, rtol=1e-4, atol=1e-5)
    alone = AdapterState(updates={}, modules_to_save=merged.modules_to_save)
    assert float((expected - consumer.logits(with_products(consumer, alone))).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CONSUMERS)
def test_peft_gives_the_logits_of_the_weighted_sum(name: str, folders: dict[str, list[Path]], tmp_path: Path) -> None:
    consumer = CONSUMERS[name]
    merge_folders(folders[name], WEIGHTS, tmp_path)
    total = {}
    for task, weight in enumerate(WEIGHTS):
        for module, update in consumer.updates(task).items():
            total[module] = total.get(module, 0) + weight * product(update)
    shapes = {name: of_parameter(consumer.build(), name) for name in total}
    by_hand = {
        module: LowRankUpdate.of_delta_weight(delta, layout=shapes[module].layout, kernel=shapes[module].kernel)
        for module, delta in total.items()
    }
    state = AdapterState(updates=by_hand, modules_to_save=consumer.trained())
    loaded = PeftModel.from_pretrained(consumer.build(), tmp_path)
    expected = consumer.logits(with_products(consumer, state))
    torch.testing.assert_close(consumer.logits(loaded), expected, rtol=1e-4, atol=1e-5)
