"""How the blocks of a model pass on a change of their input: gain, spectral norm and condition of their Jacobians.

A block, such as a layer of a transformer, maps hidden states (N, T, d) to hidden states. For each calibration example
its Jacobian J at the input it gets there, d_in = d_out = T·d over the real positions, is measured by products only:

    gain = ‖J‖²_F / d_out,   spectral norm σ₁,   condition = σ₁ √d / ‖J‖_F,  d = min(d_in, d_out).

A block that changes nothing has 1, 1 and 1. Gain is what a random change of the input grows by, squared and per entry;
the condition is how much more the worst direction grows than a typical one. They describe, and decide no ranks.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowra_analysis.empirical_fisher import Estimate
from flowra_analysis.jacobian_products import ROUNDING, JacobianProducts, inner_products
from flowra_analysis.layers import is_measurable_layer
from flowra_analysis.per_example_signals import Batch, evaluation_mode
from flowra_analysis.power_iteration import power_iteration
from flowra_analysis.trace_estimators import squared_jacobian_norms

__all__ = [
    "BlockJacobian",
    "BlockJacobians",
    "JacobianNorms",
    "block_jacobians",
    "find_blocks",
    "jacobian_norms",
    "per_example_jacobian_norms",
]


class JacobianNorms(NamedTuple):
    """What was measured of each example's Jacobian, ``(N,)`` float64 on the CPU."""

    gain: Tensor
    """‖J‖²_F / d_out, estimated."""
    spectral_norm: Tensor
    """σ₁, from below."""
    condition: Tensor
    """σ₁ √min(d_in, d_out) / ‖J‖_F, from the two estimates; 0 for a zero Jacobian."""
    relative_change: Tensor
    """Of σ₁ in the last iteration; see :class:`PowerIteration`."""
    num_iterations: Tensor
    """Of the power iteration."""


class BlockJacobian(NamedTuple):
    """What was measured of one block."""

    gain: Estimate
    """Mean and standard error over examples; the error includes that of the probes, which each example has its own."""
    spectral_norm: Estimate
    condition: Estimate
    relative_change: float
    """The largest of any example in the last iteration; above the tolerance, σ₁ was still growing."""
    num_iterations: int
    """The largest number of iterations."""

    def statistics(self) -> dict[str, float]:
        """Return what a :class:`FlowProfile` holds of a block.

        Returns:
            ``jacobian_gain``, ``jacobian_spectral_norm`` and ``jacobian_condition``, each with its ``…_stderr``, and
            ``jacobian_relative_change``.
        """
        found = {"jacobian_relative_change": self.relative_change}
        for name in ("gain", "spectral_norm", "condition"):
            estimate: Estimate = getattr(self, name)
            found |= {f"jacobian_{name}": estimate.mean, f"jacobian_{name}_stderr": estimate.standard_error}
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockJacobians:
    """What is known so far of the Jacobians of the blocks of a model.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way; the
    result is the same to within rounding. Holds five numbers for each block and example.
    """

    norms: Mapping[str, JacobianNorms] = field(default_factory=dict)
    """Block name to what was measured, of all examples so far."""

    @classmethod
    def init(cls) -> "BlockJacobians":
        """Return the state before the first batch."""
        return cls()

    def update(self, name: str, norms: JacobianNorms) -> "BlockJacobians":
        """Add the examples of one batch for one block.

        Args:
            name: the block's.
            norms: of these examples.

        Returns:
            The state with these N examples.
        """
        return self.merge(BlockJacobians(norms={name: norms}))

    def merge(self, other: "BlockJacobians") -> "BlockJacobians":
        """Return the state that has seen the examples of both."""
        norms = dict(self.norms)
        for name, theirs in other.norms.items():
            if name in norms:
                theirs = JacobianNorms(*map(torch.cat, zip(norms[name], theirs, strict=True)))
            norms[name] = theirs
        return BlockJacobians(norms=norms)

    def finalise(self) -> dict[str, BlockJacobian]:
        """Return means and standard errors over examples for each block.

        Raises:
            ValueError: if a block has fewer than two examples, which leaves its standard errors unknown.
        """
        few = {name: len(norms.gain) for name, norms in self.norms.items() if len(norms.gain) < 2}
        if few or not self.norms:
            raise ValueError(f"every block must have at least 2 examples, got {few or 'none'}. Give more batches.")
        return {
            name: BlockJacobian(
                gain=_estimate(norms.gain),
                spectral_norm=_estimate(norms.spectral_norm),
                condition=_estimate(norms.condition),
                relative_change=float(norms.relative_change.max()),
                num_iterations=int(norms.num_iterations.max()),
            )
            for name, norms in self.norms.items()
        }


def find_blocks(model: nn.Module) -> list[str]:
    """Name the blocks of a model: the members of its lists of repeated layers.

    A list is an ``nn.ModuleList``, or an ``nn.Sequential`` of modules of one class, in which each member is made of
    modules and holds a layer that can be measured. Lists inside of a block, such as experts, are not searched.

    Args:
        model: any model.

    Returns:
        Qualified names in the order of the model, those of all towers; at least one.

    Raises:
        ValueError: if there is no such list.

    >>> layer = nn.TransformerEncoderLayer(8, 2)
    >>> find_blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    ['layers.0', 'layers.1']
    """
    names = list(_blocks(model, ""))
    if not names:
        raise ValueError(
            f"model must hold an nn.ModuleList of blocks, got none in {type(model).__name__}. Name modules yourself."
        )
    return names


def block_jacobians(
    model: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[nn.Module, Batch], object],
    block_names: Iterable[str],
    *,
    mask: Callable[[Batch], Tensor] | None = None,
    num_probes: int = 16,
    max_iterations: int = 10,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, BlockJacobian]:
    """Measure the Jacobian of each named block at the inputs it gets from a model.

    To split the data over processes, update :class:`BlockJacobians` states from :func:`per_example_jacobian_norms`,
    with another seed in each, and merge them.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``run`` understands; at least two examples in all.
        run: ``(model, batch)``: calls the model, without a cache of keys and values (``use_cache=False``). What it
            returns is not used.
        block_names: exact qualified names of modules; :func:`find_blocks` gives those of the repeated layers.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens: the others are left out of input and output.
        num_probes: of ‖J‖²_F; see :func:`squared_jacobian_norms`.
        max_iterations: of σ₁; see :func:`power_iteration`.
        tolerance: of σ₁.
        seed: of the probes. They are independent between batches and examples, and the same for all blocks, so that
            blocks compare and what is measured of one does not depend on which others are named.

    Returns:
        Block name to means and standard errors over examples, in the order of ``block_names``.

    Raises:
        ValueError: as :func:`per_example_jacobian_norms`; if there are fewer than two examples.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    >>> nn.init.orthogonal_(model[0].weight) is model[0].weight
    True
    >>> found = block_jacobians(model, [torch.randn(3, 4)], lambda model, batch: model(batch), ["0"])["0"]
    >>> round(found.gain.mean, 4), round(found.spectral_norm.mean, 4), round(found.condition.mean, 4)
    (1.0, 1.0, 1.0)
    """
    state = BlockJacobians.init()
    for norms in per_example_jacobian_norms(
        model,
        batches,
        run,
        block_names,
        mask=mask,
        num_probes=num_probes,
        max_iterations=max_iterations,
        tolerance=tolerance,
        seed=seed,
    ):
        for name, each in norms.items():
            state = state.update(name, each)
    return state.finalise()


def per_example_jacobian_norms(
    model: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[nn.Module, Batch], object],
    block_names: Iterable[str],
    *,
    mask: Callable[[Batch], Tensor] | None = None,
    num_probes: int = 16,
    max_iterations: int = 10,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Iterator[dict[str, JacobianNorms]]:
    """Run the batches and yield, for each, what was measured of each named block's Jacobian, example by example.

    The model runs in eval mode without gradients; each block is then called once more, with the arguments it got, and
    differentiated. Its input is the first tensor of its arguments and its output the first of what it returns; all
    other arguments, such as masks and positions, are constants. For a block that is called several times in one run,
    each example has the mean over the calls. When a batch is yielded the model is in the modes it was in, without
    hooks; no ``.grad`` is written.

    Args:
        model: see :func:`block_jacobians`, also for the other arguments.
        batches: whatever ``run`` understands.
        run: calls the model.
        block_names: exact qualified names of modules; at least one.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens.
        num_probes: ≥ 1.
        max_iterations: ≥ 1.
        tolerance: ≥ 0.
        seed: of the probes.

    Yields:
        Block name to norms ``(N,)``, in the order of ``block_names``.

    Raises:
        ValueError: if a name is unknown, a block is not called, keeps state between calls (such as a cache), does not
            see one row per example, or is not differentiable twice, as with fused attention kernels other than
            PyTorch's; if the mask leaves nothing of an example, or a norm is not finite.
    """
    blocks = _modules_by_name(model, block_names)
    _check_attention(model)
    generator = torch.Generator().manual_seed(seed)
    for index, batch in enumerate(batches):
        batch_seed = int(torch.randint(2**62, (), generator=generator))
        real = None if mask is None else mask(batch)
        with evaluation_mode(model):
            with _calls(blocks) as calls, torch.no_grad():
                run(model, batch)
            norms: dict[str, JacobianNorms] = {}
            for name in blocks:
                try:
                    measured = [
                        jacobian_norms(
                            _products(call, real),
                            num_probes=num_probes,
                            max_iterations=max_iterations,
                            tolerance=tolerance,
                            seed=batch_seed,
                        )
                        for call in calls.pop(name, [])
                    ]
                except ValueError as error:
                    message = str(error).removesuffix(".")
                    raise ValueError(f"{message}; in block {name!r}, batch {index}.") from error
                if not measured:
                    raise ValueError(
                        f"blocks must be called by run, got no call of {name!r} in batch {index}. Exclude it."
                    )
                norms[name] = _mean_over_calls(measured)
        yield norms


def jacobian_norms(
    products: JacobianProducts,
    *,
    num_probes: int = 16,
    max_iterations: int = 10,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> JacobianNorms:
    """Measure gain, spectral norm and condition of each example's Jacobian.

    Args:
        products: the Jacobians; each of at least one row and column.
        num_probes: see :func:`squared_jacobian_norms`.
        max_iterations: see :func:`power_iteration`.
        tolerance: see :func:`power_iteration`.
        seed: of probes and start.

    Returns:
        ``(N,)`` each.

    Raises:
        ValueError: if an argument is out of range, an example has no real position, or a product is not finite.
    """
    num_inputs, num_outputs = products.num_inputs, products.num_outputs
    size = torch.minimum(num_inputs, num_outputs)
    if not size.all():
        raise ValueError(f"real must leave something of each example, got none at {(size == 0).nonzero()[0].tolist()}.")
    squares = squared_jacobian_norms(products, num_probes=num_probes, seed=seed).mean
    power = power_iteration(products, max_iterations=max_iterations, tolerance=tolerance, seed=seed)
    sigma = power.spectral_norm
    condition = torch.where(squares == 0, 0, sigma * (size / squares).sqrt())
    iterations = torch.full_like(sigma, power.num_iterations)
    norms = (squares / num_outputs, sigma, condition, power.relative_change, iterations)
    return JacobianNorms(*(each.cpu() for each in norms))


class Call(NamedTuple):
    """One call of a block."""

    block: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    x: Tensor
    """A copy of the first tensor among them, as it was before the call."""
    output: Tensor
    """A copy of the first tensor that came out."""

    def again(self, x: Tensor) -> Tensor:
        """Call the block with another input and the other arguments as they were."""
        values = [*self.args, *self.kwargs.values()]
        values[_first_tensor(values)] = x
        split = len(self.args)
        return _output(self.block(*values[:split], **dict(zip(self.kwargs, values[split:], strict=True))))


@contextmanager
def _calls(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Gather the calls of each block."""
    calls: dict[str, list[Call]] = {}
    inputs: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def before(name: str, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        values = [*args, *kwargs.values()]
        x = values[_first_tensor(values)]
        assert isinstance(x, Tensor)
        inputs[name].append(x.detach().clone())

    def after(name: str, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        x = inputs[name].pop()
        calls.setdefault(name, []).append(Call(block, args, kwargs, x, _output(output).detach().clone()))

    handles = []
    try:
        for name, block in blocks.items():
            handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(after, name), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _products(call: Call, real: Tensor | None) -> JacobianProducts:
    caches = [type(each).__name__ for each in (*call.args, *call.kwargs.values()) if _is_cache(each)]
    if caches:
        raise ValueError(f"run must call the model without a cache, got a {caches[0]}. Pass use_cache=False.")
    if call.x.is_inference():
        raise ValueError(
            "run must call the model outside torch.inference_mode, whose tensors cannot be differentiated."
        )
    if real is not None and len(call.x) != len(real):
        raise ValueError(f"mask must have one row per example, got {len(real)} for {len(call.x)}.")
    products = JacobianProducts(call.again, call.x, real=real)
    _check_repeats(call.output, products)
    return products


def _check_repeats(first: Tensor, products: JacobianProducts) -> None:
    """Refuse a block whose second call is not as its first."""
    difference = products.output_vectors(products.output - first)
    size = products.output_vectors(first)
    error, scale = (float(inner_products(each, each).sum().sqrt()) for each in (difference, size))
    if not error <= ROUNDING * scale:
        raise ValueError(
            "a block must give the same again when called again, got a difference of norm"
            f" {error:.3g} in an output of norm {scale:.3g}. It is random, or keeps state."
        )


def _mean_over_calls(measured: Sequence[JacobianNorms]) -> JacobianNorms:
    return JacobianNorms(
        gain=torch.stack([each.gain for each in measured]).mean(0),
        spectral_norm=torch.stack([each.spectral_norm for each in measured]).mean(0),
        condition=torch.stack([each.condition for each in measured]).mean(0),
        relative_change=torch.stack([each.relative_change for each in measured]).amax(0),
        num_iterations=torch.stack([each.num_iterations for each in measured]).amax(0),
    )


def _check_attention(model: nn.Module) -> None:
    """Refuse kernels that cannot be differentiated twice."""
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(implementation, str) and ("flash" in implementation or "flex" in implementation):
            raise ValueError(
                f"model must have an attention that is differentiable twice, got {implementation!r} in a"
                f' {type(module).__name__}. Load it with attn_implementation="eager" or "sdpa".'
            )


def _modules_by_name(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    by_name = dict(model.named_modules(remove_duplicate=False))
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [
        f"{name!r}, nearest names: {', '.join(difflib.get_close_matches(name, by_name, n=3)) or 'none'}"
        for name in wanted
        if name not in by_name
    ]
    if unknown or not wanted:
        raise ValueError(f"block_names must be names of modules, at least one, got {'; '.join(unknown) or 'none'}")
    return {name: by_name[name] for name in wanted}


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    members = dict(module.named_children())
    names = [f"{name}.{each}" if name else each for each in members]
    if _is_block_list(module, list(members.values())):
        yield from names
        return
    for qualified, member in zip(names, members.values(), strict=True):
        yield from _blocks(member, qualified)


def _is_block_list(module: nn.Module, members: Sequence[nn.Module]) -> bool:
    if isinstance(module, nn.Sequential):
        if len(members) < 2 or len({type(each) for each in members}) > 1:
            return False
    elif not isinstance(module, nn.ModuleList):
        return False
    return bool(members) and all(
        any(True for _ in each.children()) and any(map(is_measurable_layer, each.modules())) for each in members
    )


def _is_cache(value: object) -> bool:
    """Tell whether an argument is one of transformers' caches, or of a model's own code, by its name."""
    return any("Cache" in each.__name__ for each in type(value).__mro__)


def _first_tensor(values: Sequence[object]) -> int:
    for index, each in enumerate(values):
        if isinstance(each, Tensor):
            return index
    raise ValueError("a block must take a tensor, got none among its arguments. Exclude it.")


def _output(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values: Iterable[object] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, Sequence):
        values = output
    for each in values:
        if isinstance(each, Tensor):
            return each
    raise ValueError(f"a block must give a tensor, got a {type(output).__name__} without one. Exclude it.")


def _estimate(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))
