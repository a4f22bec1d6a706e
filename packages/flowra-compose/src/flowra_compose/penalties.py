"""Penalties that keep a new adapter away from past tasks: soft forms of the null space, added to the loss.

================================  ==========================================  =============================
penalty of a layer                formula                                     needs of the memory
================================  ==========================================  =============================
:func:`kfac_penalty`              ½ s² tr((Bᵀ S B) (A C Aᵀ))                  Σ Cᵢ and Σ Sᵢ
:func:`o_lora_penalty`            Σᵢ Σ |Aᵢ Aᵀ|                                Aᵢ
:func:`orthogonality_penalty`     Σᵢ ‖Aᵢ Aᵀ‖_F²                               Aᵢ
================================  ==========================================  =============================

Each is a sum over layers and a differentiable function of their factors, to be multiplied by a strength λ that is
tuned, and added to the loss, or in ``transformers.Trainer`` by
:class:`flowra_compose.trainer_callback.PenaltyCallback`. Each is zero before the first task has ended.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flowra_compose.memory import ModuleMemory, TaskMemory
from flowra_compose.trained_layers import TrainedPair, check_pairs

__all__ = ["kfac_penalty", "o_lora_penalty", "orthogonality_penalty"]


def kfac_penalty(layers: Mapping[str, TrainedPair], memory: TaskMemory) -> Tensor:
    """Measure how much the loss of past tasks rises, by their curvature: ½ tr(Δᵀ S Δ C) with Δ = s · B A.

    Source: Ritter, Botev & Barber 2018 (arXiv:1805.07810), restricted to the update; docs/methods.md, section 28.
    Deviation: the running sums C = Σ Cᵢ and S = Σ Sᵢ stand for Σ Cᵢ ⊗ Sᵢ, of which their product is an upper bound.

    Args:
        layers: module name to pair.
        memory: with ``outputs`` of each task, on the device of the layers.

    Returns:
        A scalar ≥ 0, in at least float32, on the device of the first layer.

    Raises:
        ValueError: if a layer does not fit the memory, or S was not given to it.
    """

    def penalty(layer: TrainedPair, module: ModuleMemory) -> Tensor:
        a, b = _wide(layer.lora_A), _wide(layer.lora_B)
        if module.inputs is None or module.outputs is None:
            if module.kept:
                raise ValueError("memory must hold outputs for the K-FAC penalty, got none. Give S after each task.")
            return a.new_zeros(())
        on_inputs, on_outputs = a @ module.inputs.to(a) @ a.T, b.T @ module.outputs.to(b) @ b
        return 0.5 * layer.scaling**2 * (on_inputs * on_outputs.T).sum()

    return _sum(layers, memory, penalty)


def o_lora_penalty(layers: Mapping[str, TrainedPair], memory: TaskMemory) -> Tensor:
    """Sum the absolute inner products of the rows of A with those of past adapters.

    It makes the row spaces of adapters orthogonal, not the update and past inputs: a weaker promise than
    :class:`~flowra_compose.NullSpace` gives. λ = 0.5 is the strength of the released code.

    Source: O-LoRA (Wang et al. 2023, arXiv:2310.14152), as its code has it; the paper squares the inner products, which
    is :func:`orthogonality_penalty`.

    Args:
        layers: module name to pair.
        memory: to which the updates of past tasks were given, on the device of the layers.

    Returns:
        A scalar ≥ 0, in at least float32, on the device of the first layer.

    Raises:
        ValueError: if a layer does not fit the memory.
    """
    return _sum(layers, memory, lambda layer, module: _products(layer, module).abs().sum())


def orthogonality_penalty(layers: Mapping[str, TrainedPair], memory: TaskMemory) -> Tensor:
    """Sum the squared inner products of the rows of A with those of past adapters, Σᵢ ‖Aᵢ Aᵀ‖_F².

    At zero the adapters read from orthogonal parts of the input, so that a plain sum of them keeps each one's answer on
    the inputs that only it reads.

    Args:
        layers: module name to pair.
        memory: to which the updates of past tasks were given, on the device of the layers.

    Returns:
        A scalar ≥ 0, in at least float32, on the device of the first layer.

    Raises:
        ValueError: if a layer does not fit the memory.
    """
    return _sum(layers, memory, lambda layer, module: _products(layer, module).square().sum())


def _products(layer: TrainedPair, module: ModuleMemory) -> Tensor:
    a = _wide(layer.lora_A)
    return module.rows.to(a) @ a.T


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _sum(
    layers: Mapping[str, TrainedPair], memory: TaskMemory, penalty: Callable[[TrainedPair, ModuleMemory], Tensor]
) -> Tensor:
    check_pairs(layers, memory.shapes)
    terms = [penalty(layer, memory.modules[name]) for name, layer in layers.items()]
    return torch.stack([each.to(terms[0].device) for each in terms]).sum()
