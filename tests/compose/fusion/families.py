"""Tiny models of the families of ``transformers`` that fusion serves."""

from typing import cast

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flowra_testing.tiny_models import seeded

VOCABULARY = 61
PAD, END = 0, 1
DECODERS = ("llama", "qwen2", "qwen3", "gpt2", "opt", "qwen2_moe")
FAMILIES = (*DECODERS, "bert")


def family(name: str, *, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model of a family, of three layers and hidden size 16, in evaluation mode."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model: PreTrainedModel
    with seeded(0):
        if name == "llama":
            model = LlamaForCausalLM(LlamaConfig(**tokens, **sizes, num_key_value_heads=2))
        elif name == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**tokens, **sizes, num_key_value_heads=2))
        elif name == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**tokens, **sizes, num_key_value_heads=2, head_dim=4))
        elif name == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**tokens, n_embd=16, n_layer=3, n_head=4, n_positions=64))
        elif name == "opt":  # its feed-forward layers see batch and positions as one
            small = {
                "hidden_size": 16,
                "ffn_dim": 24,
                "word_embed_proj_dim": 16,
                "num_attention_heads": 4,
                "dropout": 0.0,
            }
            model = OPTForCausalLM(OPTConfig(**tokens, **small, num_hidden_layers=3, max_position_embeddings=64))
        elif name == "qwen2_moe":  # and so does its shared expert
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
            shared = {"shared_expert_intermediate_size": 8, "num_key_value_heads": 2}
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**tokens, **sizes, **experts, **shared))
            model.set_experts_implementation("eager")  # the other has no float64
        else:
            model = BertModel(BertConfig(vocab_size=VOCABULARY, pad_token_id=PAD, **sizes))
    return cast("PreTrainedModel", model.to(dtype).eval())


def ids(*, size: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (size, length), generator=generator)
