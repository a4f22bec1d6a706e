"""An export is judged by its reader: peft, one with vLLM's rules, or LyCORIS must give the logits that Flowra gives.

vLLM itself needs a GPU and a server. What it makes of a file is known from its sources: it takes one rank and one alpha
for the whole adapter, ignores patterns, takes the tensors' names literally, and refuses what it cannot serve.
"""

import json
import logging
import math
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowra_adapters import disabled, sites
from flowra_pipelines.errors import UserError

__all__ = ["CheckFailed", "compare", "require_reader"]

TOLERANCE = 1e-4
ROUNDING = 1e-6
READERS = {"peft": ("peft", "peft"), "kohya": ("lycoris", "lycoris-lora")}
VLLM_PREFIX = "base_model.model."
LENGTH = 16


class CheckFailed(Exception):
    """The export's reader computes something else than Flowra; exit code 1."""


def require_reader(consumer: str) -> None:
    """Refuse a check whose judge is not installed, before anything is done.

    Raises:
        UserError: if it is not.
    """
    module, distribution = READERS.get(consumer, (None, None))
    if module is not None and find_spec(module) is None:
        raise UserError(
            f"{distribution} must be installed to check an export for {consumer}, got none."
            " Try: pip install 'flowra-pipelines[export]', or leave --check out."
        )


def compare(adapted: PreTrainedModel, fresh: PreTrainedModel, export: Path, *, consumer: str, prefix: str) -> float:
    """Let the export's own reader put it on a fresh base, and compare its answer with Flowra's on a fixed input.

    Args:
        adapted: the base with the adapter as Flowra loads it.
        fresh: the base; changed in place.
        export: folder, or kohya's file.
        consumer: ``peft``, ``vllm`` or ``kohya``.
        prefix: of kohya's names.

    Returns:
        The largest difference, relative to the largest number in Flowra's answer.

    Raises:
        CheckFailed: if it is above 1e-4 or half the adapter's effect, the adapter has no effect, or its reader fails.
        UserError: if no input can be made for this model.
    """
    inputs = _inputs(adapted)
    ours = _answer(adapted, inputs)
    with disabled(adapted):
        without = _answer(adapted, inputs)
    effect = _relative(without, ours)
    if not effect > ROUNDING:
        raise CheckFailed("adapter must change the model's answer, got no change beyond rounding. Train longer.")
    serve = {"peft": _in_peft, "vllm": _in_vllm, "kohya": _in_lycoris}[consumer]
    try:
        difference = _relative(_answer(serve(fresh, export, prefix), inputs), ours)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        problem = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else type(error).__name__
        )
        raise CheckFailed(f"{consumer} must read the export, got {problem}") from None
    if not difference <= min(TOLERANCE, effect / 2):
        raise CheckFailed(
            f"{consumer} must give Flowra's answer within {min(TOLERANCE, effect / 2):.0e}, got a difference of"
            f" {difference:.1e}; the adapter's own effect is {effect:.1e}."
        )
    return difference


def _in_peft(base: PreTrainedModel, folder: Path, prefix: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's transposed layers, which it handles
        model = import_module("peft").PeftModel.from_pretrained(base, str(folder))
    assert isinstance(model, nn.Module)
    return model.eval()


def _in_vllm(base: PreTrainedModel, folder: Path, prefix: str) -> nn.Module:
    """Add what vLLM would serve to the weights."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    refused = [key for key in ("modules_to_save", "use_dora", "use_rslora") if config.get(key)]
    if refused or config.get("bias") != "none":
        raise CheckFailed(f"vLLM must serve the adapter, got {refused or 'a bias'} in its configuration.")
    scaling, places = config["lora_alpha"] / config["r"], sites(base)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, half = key.removeprefix(VLLM_PREFIX).removesuffix(".weight").rpartition(".")
        halves.setdefault(name, {})[half.replace("lora_embedding_", "lora_")] = tensor
        if name not in places or (len(tensor) > config["r"] and half.endswith("A")):
            raise CheckFailed(f"vLLM must find a layer for every tensor, got {key!r} of shape {tuple(tensor.shape)}.")
    for name, pair in halves.items():
        operator, owner = places[name].operator, places[name].owner
        weight = owner._parameters["weight"]
        assert weight is not None
        update = operator.to_stored(scaling * operator.product(pair["lora_B"], pair["lora_A"]))
        owner.weight = nn.Parameter(weight + update.to(weight), requires_grad=False)  # one that is tied stays as it was
    return base


def _in_lycoris(base: PreTrainedModel, file: Path, prefix: str) -> nn.Module:
    lycoris = import_module("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it writes to the screen
    before = lycoris.LycorisNetwork.LORA_PREFIX
    lycoris.LycorisNetwork.LORA_PREFIX = prefix
    try:
        network, tensors = lycoris.create_lycoris_from_weights(1.0, str(file), base)
    finally:
        lycoris.LycorisNetwork.LORA_PREFIX = before
    named = {key.partition(".")[0] for key in tensors}
    if len(network.loras) != len(named):
        raise CheckFailed(f"LyCORIS must find a layer for each of {len(named)} modules, got {len(network.loras)}.")
    network.apply_to()
    network.eval()
    return base


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Make one example, always the same, of what the model reads: ids or pixels."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config.get_text_config() if model.main_input_name == "input_ids" else model.config
    if model.main_input_name == "input_ids":
        length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
        ids = torch.randint(config.vocab_size, (1, max(1, length - 2)), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**found, "decoder_input_ids": ids} if model.config.is_encoder_decoder else found
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    raise UserError(
        f"model must read ids or pixels to be checked here, got {model.main_input_name!r}. Leave --check out."
    )


@torch.no_grad()
def _answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    found = output.get("logits", next(iter(output.values())))
    assert isinstance(found, Tensor)
    return found.double()


def _relative(one: Tensor, ours: Tensor) -> float:
    difference = float((one - ours).abs().max() / ours.abs().max())
    return difference if math.isfinite(difference) else math.inf
