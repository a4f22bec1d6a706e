"""Tiny models: seeded, on the CPU, in evaluation mode unless asked otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator inside the block and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def bert_classifier(*, seed: int = 0, num_labels: int = 3, training: bool = False) -> BertForSequenceClassification:
    """Two layers, hidden size 16, with a fresh classification head."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=num_labels,
        attn_implementation="eager",
    )
    with seeded(seed):
        return BertForSequenceClassification(config).train(training)


def llama_causal_lm(*, seed: int = 0, tied: bool = False, training: bool = False) -> LlamaForCausalLM:
    """Two layers, hidden size 32, two key-value heads for four query heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with seeded(seed):
        return LlamaForCausalLM(config).train(training)


def batch(*, size: int = 3, length: int = 7, seed: int = 1, num_labels: int | None = None) -> dict[str, Tensor]:
    """Token ids and an attention mask whose last row is padded; with ``num_labels`` also class labels."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[-1, length - 2 :] = 0
    made = {"input_ids": torch.randint(0, VOCABULARY, (size, length), generator=generator), "attention_mask": mask}
    if num_labels is not None:
        made["labels"] = torch.randint(0, num_labels, (size,), generator=generator)
    return made


class MLP(nn.Module):
    """``up`` (8 → 12), ``down`` (12 → 6), ``skip`` (8 → 6), then ``head`` (6 → 3), with a buffer in between."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 6)
        self.skip = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, 8)`` to ``(…, 3)``."""
        hidden: Tensor = self.down(torch.tanh(self.up(x))) + self.skip(x) + self.shift
        output: Tensor = self.head(hidden)
        return output


def mlp(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> MLP:
    """A plain MLP with a skip connection."""
    with seeded(seed):
        return MLP().to(dtype).eval()


class Tied(nn.Module):
    """``decoder.weight`` is ``encoder.weight``; ``middle`` is free."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8, bias=False)
        self.middle = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, 8)`` to ``(…, 8)``."""
        output: Tensor = self.decoder(torch.tanh(self.middle(self.encoder(x))))
        return output


def tied(*, seed: int = 0) -> Tied:
    """A model in which two modules share one weight."""
    with seeded(seed):
        return Tied().eval()


class CalledTwice(nn.Module):
    """``shared`` runs twice in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, 8)`` to ``(…, 3)``."""
        output: Tensor = self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
        return output


def called_twice(*, seed: int = 0) -> CalledTwice:
    """A model in which one module is called twice."""
    with seeded(seed):
        return CalledTwice().eval()


def nested(*names: str, size: int = 8, seed: int = 0) -> nn.Module:
    """A module with a square linear layer under each dotted name; it is never called."""
    root = nn.Module()
    with seeded(seed):
        for name in names:
            *parents, leaf = name.split(".")
            place = root
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(leaf, nn.Linear(size, size))
    return root
