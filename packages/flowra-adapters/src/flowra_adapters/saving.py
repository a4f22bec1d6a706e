"""Save the adapter of a model to a folder: for training on, or for another system."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from flowra_adapters.applying import adapter_dicts
from flowra_adapters.flowra_files import FLOWRA_CONFIG_NAME, FLOWRA_TENSORS_NAME, flowra_content
from flowra_adapters.gathering import checkpoint_of, is_plain
from flowra_adapters.methods import AdapterMethod
from flowra_adapters.peft_layout import Consumer
from flowra_adapters.peft_writer import CONFIG_NAME, TENSORS_NAME, peft_files
from flowra_adapters.whole_files import replacing

__all__ = ["save_adapter"]


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    unit_scale: bool = False,
    consumer: Consumer | None = None,
    rank: int | None = None,
    energy: float | None = None,
    methods: Iterable[AdapterMethod] = (),
) -> Mapping[str, float]:
    """Write the named adapter of a model.

    Without a consumer it is written to be trained on: in PEFT's two files where they say all of it, else in Flowra's
    own two. For a consumer it is written in PEFT's files as that consumer reads them; where they do not say all of it,
    Flowra's pair lies beside them, and :func:`load_adapter` reads that. Files of the four that are not written are
    removed, so that a folder never holds two adapters. Whoever is killed while writing leaves the old one, the new one,
    or a folder that is refused.

    Args:
        model: is not changed.
        folder: created if missing.
        adapter: name of the set.
        modules_to_save: names of modules trained in full; all that is trained beside adapters must be in one of them.
        base_model_name_or_path: for the reader.
        task_type: PEFT's, such as ``CAUSAL_LM``; for the reader.
        unit_scale: the same as ``consumer="peft"``.
        consumer: ``peft``, ``peft_merged`` (PEFT that merges before use) or ``vllm``; see :func:`checkpoint_of`.
        rank: for a consumer, what is not LoRA is cut to this rank.
        energy: for a consumer, what is not LoRA is cut to this share of ‖ΔW‖²_F.
        methods: methods of your own that made some of the adapters.

    Returns:
        Site to the relative error ‖ΔW - s · B A‖_F / ‖ΔW‖_F of what was cut or decomposed for the consumer; empty if
        nothing was.

    Raises:
        ValueError: if there is nothing to write, something is not finite, what is trained would be lost, or the
            consumer would compute something else.
        TypeError: if a method is not LoRA for a consumer, and neither ``rank`` nor ``energy`` is given.
    """
    if unit_scale and consumer is None:
        consumer = "peft"
    if consumer is None and (rank is not None or energy is not None):
        raise ValueError(f"rank and energy must be given with a consumer, got {rank} and {energy} without")
    trained, own_methods = tuple(modules_to_save), tuple(methods)
    _refuse_left_out(model, trained)
    plain = is_plain(model, adapter=adapter)
    errors: Mapping[str, float] = {}
    written: dict[str, tuple[str, dict[str, Tensor], str]] = {}
    if plain or consumer is not None:
        checkpoint = checkpoint_of(
            model,
            adapter=adapter,
            modules_to_save=trained,
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
            consumer=consumer or "peft",
            rank=rank,
            energy=energy,
        )
        errors = checkpoint.errors
        written[TENSORS_NAME] = (CONFIG_NAME, *peft_files(checkpoint, consumer=consumer))
    if not plain:
        content = flowra_content(
            model,
            adapter=adapter,
            modules_to_save=trained,
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
            methods=own_methods,
        )
        written[FLOWRA_TENSORS_NAME] = (FLOWRA_CONFIG_NAME, *content)
    folder = Path(folder)
    places = [folder / name for name in written] + [folder / written[name][0] for name in _first_to_be_read(written)]
    with replacing(*places) as partials:
        for partial, (_, tensors, _) in zip(partials, written.values(), strict=False):
            save_file(tensors, partial, metadata={"format": "pt"})
        for partial, name in zip(partials[len(written) :], _first_to_be_read(written), strict=True):
            partial.write_text(written[name][2], encoding="utf-8")
        _remove(folder, CONFIG_NAME, FLOWRA_CONFIG_NAME)  # killed from here on, it is a folder without an adapter
    _remove(folder, *({TENSORS_NAME, FLOWRA_TENSORS_NAME} - written.keys()))
    return errors


def _refuse_left_out(model: nn.Module, trained: Iterable[str]) -> None:
    """Refuse to lose what is trained beside adapters."""
    saved = tuple(f"{name}." for name in trained)
    held = {id(each) for adapters in adapter_dicts(model).values() for each in adapters.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held and not name.startswith(saved):
            raise ValueError(
                f"modules_to_save must name all that is trained beside adapters, got {[*trained]} without {name!r}."
                " Add its module, or freeze it to leave it out."
            )


def _first_to_be_read(written: Iterable[str]) -> list[str]:
    """Put the files of which a reader takes the first that it finds into that order: Flowra's, which say all."""
    return sorted(written, key=lambda name: name != FLOWRA_TENSORS_NAME)


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
