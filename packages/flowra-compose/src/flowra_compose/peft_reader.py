"""Read PEFT's adapters as updates: LoRA, rsLoRA, DoRA and AdaLoRA on linear layers, convolutions and embeddings.

What the reader cannot mean exactly it refuses. Names, shapes and ranks are checked when a folder is opened, from the
file's header; the values of a module are read when it is asked for, and checked then.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flowra_compose.base_weights import Base, base_outline, base_reader, check_has
from flowra_compose.lazy_updates import LazyUpdates
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.peft_files import PREFIX, TENSORS_NAME, adalora_scaling, rank_and_scaling, read_config
from flowra_compose.peft_updates import BiasRecipe, Recipe, WeightRecipe
from flowra_compose.whole_tensors import TensorFile

__all__ = ["FileUpdates", "read_adapter"]

LORA_KEY = re.compile(r"(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]|lora_magnitude_vector)|(lora_B\.bias))")
ADALORA_KEY = re.compile(r"(.+)\.(lora_[ABE])")
OWN_KEY = re.compile(r"(.+)\.base_layer\.(weight|bias)")
PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


def read_adapter(folder: str | Path, base: Base | None = None) -> AdapterState:
    """Open an adapter in PEFT's format; a module's values are read when it is asked for.

    The scaling of a module is alpha / r, or alpha / √r with rsLoRA, of its own rank and alpha: those of the first key
    of ``rank_pattern`` and ``alpha_pattern`` that matches the end of its name, else the global ones; of AdaLoRA it is
    alpha / (init_r + 10⁻⁵), and E is multiplied into B. With ``fan_in_fan_out`` the base stores its linear weights
    transposed; A and B are stored as ever, and the note is passed on. ``lora_bias`` and trained biases (``bias``)
    become updates of layout ``vector`` under the bias's own name. The table in ``peft_updates.py`` says what each kind
    adds to a parameter.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``. The latter must stay as it is while the
            updates are in use.
        base: the parameters of the model that was adapted, by name, from :func:`base_weights`, from a model's
            ``state_dict()``, or a function of the name. Needed for DoRA and trained biases, and where PEFT has saved
            the base's own weight of an adapted embedding beside its update. With ``fan_in_fan_out`` a square weight
            counts as transposed. PEFT saves that flag as false where it adapts an ``nn.Linear`` beside ``Conv1D``s; the
            square ``Conv1D`` weights of such a DoRA adapter cannot be told apart: give them transposed.

    Returns:
        Its values, tensors on the CPU in the dtype of the file; what depends on the base is in float32 at least.
        AdaLoRA of a convolution is flat in the file, and comes as that of a linear layer ``(m, n k₁ k₂)``.

    Raises:
        ValueError: if a file is missing or damaged, the adapter is of a kind that has no ΔW here, a tensor is not
            understood, does not fit the others or is not of the configured rank, or the base is missing or lacks a
            parameter. On reading a module: if a tensor is not finite, the base does not fit, or the file has changed.
    """
    folder = Path(folder)
    config = read_config(folder)
    file = _open(folder)
    try:
        found = _sorted_keys(file, config)
        updates = FileUpdates(file, _recipes(found, config), base)
        _check_base(updates.needed_of_base, base)
        return AdapterState(
            updates=updates,
            modules_to_save=_Trained(file, sorted(found.saved)),
            trained_modules=tuple(found.trained),
            base_model_name_or_path=config["base_model_name_or_path"] or None,
            task_type=config["task_type"] or None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


class FileUpdates(LazyUpdates):
    """Updates by name, each read from a file when it is asked for."""

    def __init__(self, file: TensorFile, recipes: Mapping[str, Recipe], base: Base | None) -> None:
        self._file, self._recipes, self._base = file, recipes, base
        self.outlines: Mapping[str, LowRankUpdate] = {
            name: self._made(name, file.outlines, outline=True) for name in sorted(recipes)
        }

    def only(self, names: Collection[str]) -> "FileUpdates":
        """Return those of some names."""
        return FileUpdates(
            self._file, {name: self._recipes[name] for name in self._recipes if name in names}, self._base
        )

    @property
    def needed_of_base(self) -> list[str]:
        """Names of the parameters of the base that the updates are made with, sorted."""
        return sorted(filter(None, map(_needs, self._recipes.values())))

    def _made(self, name: str, tensors: Mapping[str, Tensor], *, outline: bool) -> LowRankUpdate:
        try:
            return self._recipes[name].update(tensors, base_outline if outline else base_reader(self._base))
        except ValueError as error:
            raise ValueError(f"{error}; for {name!r}") from None

    def __getitem__(self, name: str) -> LowRankUpdate:
        """Read one update."""
        if name not in self._recipes:
            raise KeyError(name)
        try:
            return self._made(name, self._file, outline=False)
        except ValueError as error:
            raise ValueError(f"{error}; in {self._file.path.parent}") from None


class _Trained(Mapping[str, Tensor]):
    """Tensors of modules trained in full, by name without the prefix, each read when it is asked for."""

    def __init__(self, file: TensorFile, names: list[str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Tensor:
        return self._file[PREFIX + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(folder: Path) -> TensorFile:
    path = folder / TENSORS_NAME
    if not path.is_file():
        pickles = sorted(each.name for each in folder.iterdir() if each.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f" {pickles[0]} is a pickle, never opened: convert it to safetensors." if pickles else ""
        raise ValueError(f"adapter must hold {TENSORS_NAME}, got none in {folder}.{hint}")
    return TensorFile(path)


@dataclass
class _Found:
    """The keys of a file, sorted by what their tensors are."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module to what a tensor is to its key."""
    biases: dict[str, str] = field(default_factory=dict)
    """Name of a trained bias to its key."""
    saved: list[str] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)


def _sorted_keys(file: TensorFile, config: Mapping[str, Any]) -> _Found:
    """Sort all keys; one that is nothing is an error, and so is a module that lacks a part."""
    adaptive = config["peft_type"] == "ADALORA"
    trained_biases = config.get("bias") not in ("none", None)
    extra = {"lora_E"} if adaptive else set()
    extra |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
    extra |= {"lora_B.bias"} if config.get("lora_bias") else set()
    found, unknown = _Found(), []
    for key in file:
        name = key.removeprefix(PREFIX)
        factor = (ADALORA_KEY if adaptive else LORA_KEY).fullmatch(name)
        own = OWN_KEY.fullmatch(name)
        owner = _trained_module(name, config["modules_to_save"])
        if key == name:
            unknown.append(key)
        elif factor:
            found.parts.setdefault(factor[1], {})[factor[factor.lastindex or 0]] = key
        elif owner and trained_biases and _is_copy(name, owner, file):
            continue
        elif owner:
            found.saved.append(name)
            found.trained.add(owner)
        elif own and own[2] == "weight":
            found.parts.setdefault(own[1], {})["weight"] = key
        elif trained_biases and name.endswith(".bias"):
            found.biases[f"{own[1]}.bias" if own else name] = key
        else:
            unknown.append(key)
    allowed = PAIRS[0] | PAIRS[1] | extra | {"weight"}
    unknown += [key for parts in found.parts.values() for part, key in parts.items() if part not in allowed]
    if unknown:
        raise ValueError(f"tensors must be LoRA factors or belong to modules_to_save, got {unknown}")
    whole = [pair | extra for pair in PAIRS]
    partial = [
        f"{name} ({', '.join(sorted(parts))})"
        for name, parts in sorted(found.parts.items())
        if parts.keys() - {"weight"} not in whole
    ]
    if partial or not found.parts:
        also = "".join(f", {part}" for part in sorted(extra))
        raise ValueError(f"every module must have lora_A and lora_B{also}, got {', '.join(partial) or 'no factors'}")
    nested = sorted(name for name in found.parts if ".base_layer." in f".{name}.")
    if nested:
        raise ValueError(
            f"modules must be wrapped once, got {nested}: of an nn.MultiheadAttention, or several parameters of one"
            " module. Merge it into its model."
        )
    return found


def _recipes(found: _Found, config: Mapping[str, Any]) -> dict[str, Recipe]:
    """Say for each update how it is made."""
    scaling_of_all = adalora_scaling(config) if config["peft_type"] == "ADALORA" else None
    kept = {} if scaling_of_all is None else _kept_ranks(config)
    recipes: dict[str, Recipe] = {}
    offsets: dict[str, tuple[str, float]] = {}
    for name, parts in found.parts.items():
        if scaling_of_all is None:
            rank, scaling = rank_and_scaling(name, config)
        else:
            rank, scaling = kept.get(name, config["init_r"]), scaling_of_all
        if rank == 0:
            continue
        offset = parts.get("lora_B.bias")
        if offset is not None:
            offsets[f"{name}.bias"] = offset, scaling
        of_weight = {part: key for part, key in parts.items() if part != "lora_B.bias"}
        transposed = bool(config.get("fan_in_fan_out"))
        recipes[name] = WeightRecipe(name=name, parts=of_weight, rank=rank, scaling=scaling, transposed=transposed)
    for name in sorted({*offsets, *found.biases}):
        if name in recipes:
            raise ValueError(f"names must be of one update, got a module and a bias called {name!r}")
        offset, scaling = offsets.get(name, (None, 1.0))
        recipes[name] = BiasRecipe(name=name, offset=offset, scaling=scaling, trained=found.biases.get(name))
    return recipes


def _kept_ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """Count the triplets that AdaLoRA has left of each module; a list tells which of ``init_r`` they are."""
    kept = {}
    for key, mask in config["rank_pattern"].items():
        whole = isinstance(mask, list) and len(mask) == config["init_r"]
        if not whole or not all(isinstance(each, bool) for each in mask):
            raise ValueError(f"rank_pattern must hold init_r booleans for each key, got {str(mask)[:40]} for {key!r}")
        kept[re.sub(r"\.lora_E(\.[^.]+)?$", "", key).removeprefix(PREFIX)] = sum(mask)
    return kept


def _trained_module(name: str, modules: list[str]) -> str | None:
    """Return the outermost owner of a tensor that is in the list, which PEFT matches by the end of the name."""
    parts = name.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((owner for owner in owners if any(f".{owner}".endswith(f".{module}") for module in modules)), None)


def _is_copy(name: str, owner: str, file: TensorFile) -> bool:
    """Tell whether a bias of a module trained in full is there under its own name, too: ``bias`` saves it thrice."""
    copy, _, inner = name.removeprefix(f"{owner}.").partition(".")
    if copy not in ("modules_to_save", "original_module") or "bias" not in inner:
        return False
    deeper = inner.partition(".")[2]  # without the set's name, which PEFT leaves in where the module has modules
    return any(f"{PREFIX}{owner}.{each}" in file for each in (inner, deeper))


def _needs(recipe: Recipe) -> str | None:
    """Return the name of the parameter of the base that an update is made with."""
    if isinstance(recipe, BiasRecipe):
        return recipe.name if recipe.trained is not None else None
    return f"{recipe.name}.weight" if recipe.parts.keys() & {"weight", "lora_magnitude_vector"} else None


def _check_base(needed: list[str], base: Base | None) -> None:
    """Refuse a base that is missing, or that is known to lack a parameter, before any value is read."""
    if needed and base is None:
        raise ValueError(
            f"base must be given for DoRA, trained biases and saved base weights, got none for {needed[:3]}."
            " Give base=base_weights(<folder of the model>)."
        )
    if isinstance(base, Mapping):
        for name in needed:
            check_has(base, name)
