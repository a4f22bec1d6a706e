"""Training that leaves what past tasks see alone: A U = 0, at the start and after every step of the optimiser.

For every input x in the span of U (:mod:`flowra_compose.memory`) the update is then s · B A x = 0, whatever B is, so a
layer answers past inputs as before, and so does, layer by layer, the model. Of inputs that U holds to a share ε of
their energy, the output moves by at most s ‖B‖ ‖A‖ √(1 − ε) times their root mean square.

Source: docs/methods.md, section 28; the projection of gradients is that of GPM (Saha et al. 2021, arXiv:2103.09762).
Deviation: Adam does not move in the span of its gradients, so that projecting these guarantees nothing; the parameter
itself is projected, and the first moment, which else would push against the projection at every step.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_compose.memory import TaskMemory
from flowra_compose.trained_layers import TrainedPair, check_pairs

__all__ = ["LENGTH", "NullSpace", "projected"]

LENGTH = 1 / math.sqrt(3)
"""Length that a row of A has on average where its entries are drawn from ±1/√n, as LoRA's are."""
TOLERANCE = 1e-6
WITHIN = 1e-3  # a row that has less than this share of its length off the memory has no direction of its own
FIRST = frozenset({"exp_avg", "momentum_buffer"})
SECOND = frozenset({
    *("exp_avg_sq", "max_exp_avg_sq", "variance"),
    *("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"),
})


def projected(a: Tensor, basis: Tensor) -> Tensor:
    """Take the rows of A off the span of U: A − (A U) Uᵀ.

    Args:
        a: ``(r, n)``.
        basis: U ``(n, k)``, orthonormal columns.

    Returns:
        Like ``a``, computed in float64 (the TF32 of accelerators would leave 1e-3 of A in the span).
    """
    wide, u = a.double(), basis.to(a.device, torch.float64)
    return (wide - (wide @ u) @ u.T).to(a.dtype)


class NullSpace:
    """Keep the A of every layer off what a memory holds, while the layers train.

    A module of which nothing is remembered is left alone, bit by bit: the first task is ordinary training.
    In a loop of one's own::

        space = NullSpace(layers, memory)
        space.start()  # before the optimiser is built
        for batch in batches:
            ...
            optimizer.step()
            space.after_step(optimizer)

    With ``transformers.Trainer`` use :class:`flowra_compose.trainer_callback.NullSpaceCallback`.

    Args:
        layers: module name to trainable pair, float32 or float64 (in half precision A U = 0 cannot be said).
        memory: of the tasks so far; it has all these modules.

    Raises:
        ValueError: if a layer is no plain pair, of another shape or dtype than that, sharded, or not of the memory.
    """

    def __init__(self, layers: Mapping[str, TrainedPair], memory: TaskMemory) -> None:
        check_pairs(layers, memory.shapes)
        for name, layer in layers.items():
            if layer.lora_A.dtype not in (torch.float32, torch.float64) or hasattr(layer.lora_A, "placements"):
                got = f"{layer.lora_A.dtype} {type(layer.lora_A).__name__}"
                raise ValueError(f"lora_A must be float32 or float64, and whole, got {got} at {name!r}")
        self._layers = dict(layers)
        self._bases = {name: memory.modules[name].basis for name in layers}

    @torch.no_grad()
    def start(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Give A its start off the memory; rows keep their lengths. Call before training, with B = 0.

        Args:
            gradients: module name to the mean gradient G ``(m, n)`` of the new task's loss with respect to the weight.
                The leading right singular vectors of G (I − UUᵀ) become the rows, of length 1/√3; if there are fewer
                than rows, the last rows are those that A has, projected. None to project all the rows that A has.

        Raises:
            ValueError: if a B is not zero, a row of A lies within the memory, or a gradient is missing or of another
                shape. Nothing is changed then.
        """
        starts = {}
        for name, layer in self._layers.items():
            if layer.lora_B.any():
                raise ValueError(f"lora_B must be zero at the start, got another at {name!r}. Start with a new pair.")
            rows = layer.lora_A.detach()
            if self._bases[name].shape[1] > 0:
                rows = _of_their_lengths(rows, self._bases[name], name)
            if gradients is not None:
                shape = len(layer.lora_B), rows.shape[1]
                given = gradients.get(name)
                if given is None or tuple(given.shape) != shape or not torch.isfinite(given).all():
                    got = None if given is None else tuple(given.shape)
                    raise ValueError(f"gradients must be finite {shape} for {name!r}, got {got}")
                found = _row_space(projected(given.detach().double(), self._bases[name]))[: len(rows)]
                rows = torch.cat([LENGTH * found.to(rows), rows[len(found) :]])
            starts[name] = projected(rows, self._bases[name]) if self._bases[name].shape[1] > 0 else rows
        for name, layer in self._layers.items():
            layer.lora_A.copy_(starts[name])

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Project every A that is trained, and the optimiser's first moment of it.

        Served are optimisers whose state is made of the moments of Adam, AdamW, NAdam, RAdam, SGD, Muon and Adafactor.

        Args:
            optimizer: that has just made a step.

        Raises:
            ValueError: if it does not hold A itself, or remembers something else of it.
        """
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        trained = self._projected_layers()
        for name, layer in trained.items():
            _check_state(optimizer, layer.lora_A, held, name)
        for name, layer in trained.items():
            self._bases[name] = self._bases[name].to(layer.lora_A.device)
            state = optimizer.state.get(layer.lora_A, {})
            for tensor in (layer.lora_A, *(state[key] for key in FIRST if isinstance(state.get(key), Tensor))):
                tensor.copy_(projected(tensor, self._bases[name]))

    def overlaps(self) -> dict[str, float]:
        """Return max |A U| of each layer; 0 where nothing is remembered."""
        found = {}
        for name, layer in self._layers.items():
            a = layer.lora_A.detach().double()
            overlap = a @ self._bases[name].to(a.device, torch.float64)
            found[name] = overlap.abs().max().item() if overlap.numel() else 0.0
        return found

    def check(self) -> None:
        """Refuse an A that is not off the memory: max |A U| > 1e-6, or that share of the longest row if it is longer.

        Raises:
            ValueError: if there is one.
        """
        for name, overlap in self.overlaps().items():
            a = self._layers[name].lora_A.detach().double()
            limit = TOLERANCE * max(1.0, a.norm(dim=1).max().item() if a.numel() else 0.0)
            if not overlap <= limit:
                raise ValueError(
                    f"A U must be zero to {limit:.1g}, got {overlap:.3g} at {name!r}. Call start() before training;"
                    " a run that is resumed needs the memory that it began with."
                )

    def check_alone(self, model: nn.Module, also_trained: Iterable[nn.Parameter] = ()) -> None:
        """Refuse to train anything else: it would change what past tasks see, and nothing would fail.

        Args:
            model: that is trained.
            also_trained: what may be trained all the same, such as the new task's own head.

        Raises:
            ValueError: if another parameter of the model is trained, or a layer is not part of it. While nothing is
                remembered, anything may be trained.
        """
        pairs = {id(each) for layer in self._layers.values() for each in (layer.lora_A, layer.lora_B)}
        named = {id(each): name for name, each in model.named_parameters()}
        absent = [name for name, layer in self._layers.items() if id(layer.lora_A) not in named]
        if absent:
            raise ValueError(f"layers must be part of the model that is trained, got {absent[0]!r}, which is not.")
        allowed = pairs | {id(each) for each in also_trained}
        others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in allowed]
        if others and any(basis.shape[1] > 0 for basis in self._bases.values()):
            raise ValueError(
                f"parameters other than the layers' must be frozen, got {others[:3]}, which would change past tasks."
                " Freeze them, or name those that only the new task uses as also_trained."
            )

    def _projected_layers(self) -> dict[str, TrainedPair]:
        return {
            name: layer
            for name, layer in self._layers.items()
            if layer.lora_A.requires_grad and self._bases[name].shape[1] > 0 and layer.lora_A.numel() > 0
        }


def _of_their_lengths(rows: Tensor, basis: Tensor, name: str) -> Tensor:
    """Project rows and stretch them to the lengths that they had."""
    wide = rows.double()
    off = projected(wide, basis)
    before, after = wide.norm(dim=1, keepdim=True), off.norm(dim=1, keepdim=True)
    if not (after > WITHIN * before).all():
        raise ValueError(f"lora_A must have rows off the memory, got one within it at {name!r}. Draw A anew.")
    stretched: Tensor = off * (before / after)
    return stretched.to(rows)


def _row_space(matrix: Tensor) -> Tensor:
    """Return the right singular vectors of the singular values that are not rounding, as rows."""
    _, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    real: Tensor = vh[sigma > max(matrix.shape) * torch.finfo(torch.float32).eps * sigma.max()]
    return real


def _check_state(optimizer: Optimizer, a: nn.Parameter, held: set[int], name: str) -> None:
    if id(a) not in held:
        raise ValueError(
            f"optimizer must hold lora_A of each layer itself, got {type(optimizer).__name__} without {name!r}."
            " Build it of the model's parameters."
        )
    unknown = [key for key, value in optimizer.state.get(a, {}).items() if not _is_known(key, value, a)]
    if unknown:
        raise ValueError(
            f"optimizer state must be moments as those of AdamW, got {unknown} of {name!r} in"
            f" {type(optimizer).__name__}. Use AdamW."
        )


def _is_known(key: str, value: object, a: Tensor) -> bool:
    """Tell whether a value is a moment under a known name, or does not depend on directions."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return type(value) is Tensor and (key in SECOND or (key in FIRST and value.shape == a.shape))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))
