"""Real architectures, tiny: one set of patterns, every layer type, from attaching to the file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from flowra_adapters import Adapter, attach, load_adapter, merge, save_adapter, unmerge
from flowra_testing.tiny_models import seeded

EVERYTHING = {"all-layers": 2, "all-norms": 1}
"""The one configuration."""
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
LLAMA = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 32}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@dataclass(frozen=True)
class Architecture:
    """How to build one, and how to run it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "logits"
    patterns: dict[str, int] = field(default_factory=dict)
    """More than the one configuration means."""
    without: tuple[str, ...] = ()
    """What takes no part in this output, or cannot change it: pieces of names, with the reason beside them."""
    peft: bool = True
    """Whether PEFT knows the model's linear layers."""


def ids(size: int = 2, length: int = 6, vocabulary: int = 40) -> Tensor:
    return torch.randint(3, vocabulary, (size, length), generator=torch.Generator().manual_seed(1))


def pixels(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def image() -> dict[str, Tensor]:
    return {"pixel_values": pixels()}


def described(tokens: int, image_token: int) -> dict[str, Tensor]:
    """Text that begins with an image."""
    placeholders = torch.full((2, tokens), image_token)
    return {"input_ids": torch.cat([placeholders, ids()], 1), "pixel_values": pixels()}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**TEXT, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    )


def deberta_v3() -> nn.Module:
    config = transformers.DebertaV2Config(
        **TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=2)
    )


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5Model(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, **IMAGE, num_labels=3))


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET, num_labels=3))


def convnext_v2() -> nn.Module:
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    return transformers.ConvNextV2ForImageClassification(config)


def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16},
        vision_config={**VIT, **IMAGE},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def blip_2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config={**VIT, **IMAGE},
        qformer_config={**TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config=transformers.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        ).to_dict(),
        num_query_tokens=3,
        image_token_index=39,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VIT, **IMAGE),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=39,
        image_token_id=39,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def detr() -> nn.Module:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage2"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_queries=4,
        num_labels=3,
    )
    return transformers.DetrForObjectDetection(config)


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        hidden_size=8,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        pool_scales=[1, 2],
        num_labels=3,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def noise() -> dict[str, Tensor]:
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    return {"sample": pixels(8, 4), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": context}


ARCHITECTURES = {
    "bert": Architecture(bert, text),
    "roberta": Architecture(roberta, text),
    "deberta_v3": Architecture(deberta_v3, text),
    "gpt2": Architecture(gpt2, text, patterns={"c_attn:v": 1}),
    "llama": Architecture(llama, text),
    "mixtral": Architecture(mixtral, text, patterns={"gate_up_proj:[0-9]": 2, "down_proj:[0-9]": 1}),
    "t5": Architecture(
        t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(length=4)}, output="last_hidden_state"
    ),
    "vit": Architecture(vit, image),
    "resnet": Architecture(resnet, image),
    "convnext_v2": Architecture(convnext_v2, image),
    "clip": Architecture(clip, lambda: {"input_ids": ids(), "pixel_values": pixels()}, output="logits_per_text"),
    "blip_2": Architecture(blip_2, lambda: described(3, 39)),
    "llava": Architecture(
        llava,
        lambda: described(4, 39),
        without=("vision_tower.post_layernorm",),  # only a pooled output passes it
    ),
    "detr": Architecture(
        detr,
        lambda: {"pixel_values": pixels(32)},
        without=("bbox_predictor.", "decoder.layers.0.self_attn."),  # another output; what it attends to is all zero
    ),
    "upernet": Architecture(
        upernet,
        lambda: {"pixel_values": pixels(64)},
        without=("auxiliary_head.",),  # it helps the loss, not the logits
    ),
    "unet": Architecture(unet, noise, output="sample"),
}


def built(name: str) -> nn.Module:
    with seeded(0):
        model = ARCHITECTURES[name].build().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)  # initial weights of 0.02 and of zero would hide gradients
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def run(model: nn.Module, name: str) -> Tensor:
    """Return the output, and what belongs to it, in one row."""
    architecture = ARCHITECTURES[name]
    output: Tensor = model(**architecture.inputs())[architecture.output]
    return output


def trained(
    name: str, ranks: dict[str, int], method: str, *, training: bool = True
) -> tuple[nn.Module, dict[str, Adapter]]:
    """Attach and take two steps: after the first, what started at zero lets gradients through."""
    model = built(name)
    before = run(model, name)
    attached = attach(model, ranks, method=method)
    torch.testing.assert_close(run(model, name), before, rtol=1e-5, atol=1e-6)
    model.train(training)
    parameters = [parameter for one in attached.values() for parameter in one.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with seeded(4):  # dropout
            run(model, name).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval(), attached


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_configuration_attaches_trains_merges_and_reads_back(name: str, tmp_path: Path) -> None:
    ranks = {**EVERYTHING, **ARCHITECTURES[name].patterns}
    model, attached = trained(name, ranks, "polymorphic")
    silent = [
        site
        for site, one in attached.items()
        if not all(p.grad is not None and p.grad.abs().max() > 0 for p in one.parameters())
    ]
    without = ARCHITECTURES[name].without
    assert [site for site in silent if not any(piece in site for piece in without)] == []
    unmerged = run(model, name).detach()
    merge(model)
    close(run(model, name), unmerged)
    unmerge(model)
    torch.testing.assert_close(run(model, name), unmerged, rtol=0, atol=0)
    save_adapter(model, tmp_path)
    read = built(name)
    load_adapter(read, tmp_path)
    torch.testing.assert_close(run(read.eval(), name), unmerged, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # of a model that has both kinds of layer
@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.peft])
def test_lora_on_every_linear_layer_is_read_by_peft(name: str, tmp_path: Path) -> None:
    model, _ = trained(name, {"all-linear": 2}, "lora", training=False)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(built(name), str(tmp_path)).eval()
    close(run(theirs.base_model.model, name), run(model, name), 1e-5)
    ours = built(name)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(run(ours.eval(), name), run(model, name), rtol=0, atol=0)
