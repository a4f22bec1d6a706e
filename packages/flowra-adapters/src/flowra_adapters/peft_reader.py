"""Read PEFT's LoRA, DoRA and AdaLoRA files, ours or another writer's, as values.

Only safetensors and JSON are read; a file beside them in any other format is never opened. What the reader cannot mean
exactly it refuses.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flowra_adapters.checkpoint import DTYPES, AdapterCheckpoint, Kind, owner_of
from flowra_adapters.json_files import read_json_object, read_tensors
from flowra_adapters.peft_layout import stack_from_peft
from flowra_adapters.peft_writer import CONFIG_NAME, PREFIX, TENSORS_NAME

__all__ = ["read_checkpoint"]

OFF: tuple[Any, ...] = (None, False, [], {})
# Options that change what the tensors mean, with the values that do not; others are refused rather than ignored. The
# initialisations listed leave the base weight alone; the rest (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so that
# B A would not be the whole update.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "ADALORA"),
    "bias": ("none", None, "lora_only", "all"),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False, None),
    "use_dora": (True, False, None),
    "lora_bias": (True, False, None),
    "fan_in_fan_out": (True, False, None),
    **dict.fromkeys(
        (
            "layer_replication",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
        ),
        OFF,
    ),
}
KINDS: Mapping[str, type] = {
    "base_model_name_or_path": str,
    "task_type": str,
    "modules_to_save": list,
    "target_parameters": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
LORA_KEY = re.compile(r"(.+)\.(?:(lora_[AB])\.weight|lora_embedding_([AB])|(lora_magnitude_vector)|lora_B\.(bias))")
ADALORA_KEY = re.compile(r"(.+)\.(lora_[ABE])()()()")


def read_checkpoint(folder: str | Path) -> AdapterCheckpoint:
    """Read a LoRA, DoRA or AdaLoRA adapter in PEFT's format, ours or another writer's.

    AdaLoRA becomes LoRA: E is multiplied into B, and s is alpha / (init_r + 1e-5), as PEFT has it.

    Returns:
        Its values, with the scaling of each module from the global or per-module rank and alpha and rsLoRA.

    Raises:
        ValueError: if a file is missing or damaged, an option would change the meaning of the tensors, a tensor is not
            understood, or factor shapes disagree with the configured ranks.
    """
    folder = Path(folder)
    config = _read_config(folder)
    found = _sort(read_tensors(folder / TENSORS_NAME), config, folder)
    adaptive = config.get("peft_type") == "ADALORA"
    try:
        factors, scalings, kinds = _adalora(found, config) if adaptive else _lora(found, config)
        return AdapterCheckpoint(
            factors=factors,
            scalings=scalings,
            kinds=kinds,
            magnitudes={name: each.flatten() for name, each in found.magnitudes.items()},
            biases=found.biases,
            bias_offsets={name: each * scalings.get(name, 1.0) for name, each in found.offsets.items()},
            modules_to_save=found.saved,
            trained_modules=tuple(sorted(found.trained)),
            base_model_name_or_path=config["base_model_name_or_path"] or None,
            task_type=config["task_type"] or None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass
class _Found:
    """The tensors of a file, sorted."""

    halves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)


def _lora(found: _Found, config: Mapping[str, Any]) -> tuple[Factors, dict[str, float], dict[str, Kind]]:
    ranks, alphas = _Pattern(config, "rank_pattern", "r"), _Pattern(config, "alpha_pattern", "lora_alpha")
    factors: Factors = {}
    scalings: dict[str, float] = {}
    kinds: dict[str, Kind] = dict.fromkeys(sorted(found.embeddings), "embedding")
    parameters = _parameters(found, config["target_parameters"])
    blocks = _attention_blocks(found)
    for path, pair in sorted(found.halves.items()):
        a, b = pair["lora_A"], pair["lora_B"]
        name = parameters.get(path, path)
        if path in blocks:
            kinds[name] = "attention"
        rank = ranks.value(name)
        if path in parameters:
            if not rank.is_integer() or rank < 1:
                raise ValueError(f"rank must be a whole number above 0, got {rank:g} for {name!r}")
            kinds[name] = "parameter"
            a, b = stack_from_peft(a, b, int(rank))
        elif a.ndim >= 2 and rank != a.shape[0]:
            raise ValueError(f"rank must be what the configuration says, {rank:g}, got {a.shape[0]} for {name!r}")
        factors[name] = a, b
        scalings[name] = alphas.value(name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if bool(config.get("use_dora")) != bool(found.magnitudes):
        raise ValueError(f"use_dora must say whether there are magnitudes, got {repr(config.get('use_dora'))[:40]}")
    if bool(config.get("lora_bias")) != bool(found.offsets):
        raise ValueError(f"lora_bias must say whether lora_B has biases, got {repr(config.get('lora_bias'))[:40]}")
    for name, magnitude in found.magnitudes.items():
        m = factors[name][1].shape[0] if name in factors else 0
        if magnitude.numel() != m or max(magnitude.shape, default=0) != m:
            raise ValueError(f"magnitudes must have one value for each of {m} rows, got {tuple(magnitude.shape)}")
    for name, offset in found.offsets.items():
        if name not in factors or offset.shape != factors[name][1].shape[:1] or offset.dtype not in DTYPES:
            got = f"{tuple(offset.shape)} of {offset.dtype}"
            raise ValueError(f"lora_B must have a bias (m,), floating point of ≥ 16 bits, got {got} for {name!r}")
    return factors, scalings, kinds


SECOND = ".base_layer.out_proj"


def _attention_blocks(found: _Found) -> set[str]:
    """Take out the output projections of attention blocks, which must have no update.

    PEFT 0.21.2 adds such an update twice; a later one may not.

    Returns:
        The blocks.

    Raises:
        ValueError: if there is such an update, or another module is wrapped twice.
    """
    blocks = set()
    for path in [path for path in found.halves if path.endswith(SECOND)]:
        pair = found.halves.pop(path)
        if pair["lora_A"].count_nonzero() and pair["lora_B"].count_nonzero():
            raise ValueError(
                f"the out_proj of an attention block must have no update, got one at {path[:200]!r}, which PEFT adds"
                " once or twice, depending on its version"
            )
        blocks.add(path.removesuffix(SECOND))
    wrapped = [path for path in found.halves if ".base_layer." in f"{path}."]
    if wrapped:
        raise ValueError(f"modules must be wrapped once, got {wrapped[0][:200]!r}: several parameters of one module")
    return blocks


def _parameters(found: _Found, targets: list[str]) -> dict[str, str]:
    """Return the raw parameter of each wrapped module; several of one module are told apart by its order only."""
    by_path: dict[str, str] = {}
    for target in targets:
        module, _, parameter = target.rpartition(".")
        paths = [path for path in found.halves if module and f".{path}".endswith(f".{module}")]
        if not paths:
            raise ValueError(f"target_parameters must name parameters with factors, got {target[:200]!r}")
        for path in paths:
            if path in by_path:
                raise ValueError(
                    f"target_parameters must name one parameter of a module, got several of {path[:200]!r}, whose"
                    " factors only the model's own order tells apart"
                )
            by_path[path] = f"{path}.{parameter}"
    return by_path


def _adalora(found: _Found, config: Mapping[str, Any]) -> tuple[Factors, dict[str, float], dict[str, Kind]]:
    """Multiply E into B. A list of a rank pattern tells which of ``init_r`` triplets are left."""
    initial, alpha = _Pattern(config, "", "init_r").value(""), _Pattern(config, "", "lora_alpha").value("")
    if alpha < 0:
        raise ValueError(f"lora_alpha must be above 0 for AdaLoRA, got {alpha:g}")
    kept = {}
    for key, mask in config["rank_pattern"].items():
        if not isinstance(mask, list) or len(mask) != initial or not all(isinstance(each, bool) for each in mask):
            raise ValueError(
                f"rank_pattern must hold lists of {initial:g} booleans, got {repr(mask)[:40]} for {key[:100]!r}"
            )
        kept[re.sub(r"\.lora_E(\.[^.]+)?$", "", key).removeprefix(PREFIX)] = sum(mask)
    factors: Factors = {}
    for name, parts in sorted(found.halves.items()):
        a, b, e = parts["lora_A"], parts["lora_B"], parts["lora_E"]
        rank = kept.get(name, initial)
        if a.ndim != 2 or b.ndim != 2 or e.shape != (len(a), 1) or b.shape[1] != len(a) or len(a) != rank:
            shapes = f"{tuple(a.shape)}, {tuple(e.shape)}, {tuple(b.shape)}"
            raise ValueError(f"AdaLoRA's factors must be (r, n), (r, 1), (m, r) with r = {rank:g}, got {shapes}")
        if not {a.dtype, b.dtype, e.dtype} <= DTYPES:
            dtypes = f"{a.dtype}, {e.dtype}, {b.dtype}"
            raise ValueError(f"AdaLoRA's factors must be floating point of ≥ 16 bits, got {dtypes} for {name!r}")
        if len(a):
            factors[name] = a, b * e.T
    return factors, dict.fromkeys(factors, alpha / (initial + 1e-5)), {}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config = read_json_object(path)
    strange = {key: config.get(key) for key, allowed in NEUTRAL.items() if config.get(key) not in allowed}
    adaptive = config.get("peft_type") == "ADALORA"
    if adaptive:
        mixed = ("use_rslora", "use_dora", "lora_bias", "target_parameters", "alpha_pattern")
        strange |= {key: config[key] for key in mixed if config.get(key)}
    if strange:
        raise ValueError(
            f"adapter must be plain LoRA, got {repr(strange)[:200]} in {path}. Convert it with PEFT first."
        )
    for key, kind in KINDS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} must be a {kind.__name__} or null, got {repr(value)[:100]}; in {path}")
        config[key] = kind() if value is None else value
    for key in ("modules_to_save", "target_parameters"):
        if not all(isinstance(name, str) and name for name in config[key]):
            raise ValueError(f"{key} must be names, got {repr(config[key])[:100]}; in {path}")
    return config


def _sort(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> _Found:
    """Sort tensors by what they are; one that is nothing is an error.

    Returns:
        All of them.

    Raises:
        ValueError: if a tensor is not understood or a factor is alone.
    """
    found = _Found()
    adaptive = config.get("peft_type") == "ADALORA"
    biased = config.get("bias") not in ("none", None)
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        match = (ADALORA_KEY if adaptive else LORA_KEY).fullmatch(path)
        owner = owner_of(path, config["modules_to_save"])
        if key == path or not (match or owner or (biased and path.endswith(".bias"))):
            raise ValueError(f"tensors must be LoRA factors or lie in modules_to_save, got {key!r} in {folder}")
        if match:
            name, half, embedding, magnitude, _ = match.groups()
            if magnitude:
                found.magnitudes[name] = tensor
            elif half or embedding:
                parts = found.halves.setdefault(name, {})
                if (half or f"lora_{embedding}") in parts:
                    raise ValueError(
                        f"a module must have one lora_A and one lora_B, got several for {name!r} in {folder}"
                    )
                parts[half or f"lora_{embedding}"] = tensor
                found.embeddings |= {name} if embedding else set()
            else:
                found.offsets[name] = tensor
        elif owner:
            if biased and _is_copy(path, owner, tensors):
                continue
            found.saved[path] = tensor
            found.trained.add(owner)
        else:
            found.biases[path.replace(".base_layer.bias", ".bias")] = tensor
    whole = {"lora_A", "lora_B", "lora_E"} if adaptive else {"lora_A", "lora_B"}
    alone = [name for name, parts in found.halves.items() if parts.keys() != whole]
    if alone or not found.halves:
        raise ValueError(
            f"every module must have lora_A and lora_B, got {str(alone)[:200] if alone else 'no factors'} in {folder}"
        )
    stray = sorted((found.magnitudes.keys() | found.offsets.keys()) - found.halves.keys())
    if stray:
        raise ValueError(
            f"every module must have lora_A and lora_B, got others alone for {str(stray)[:200]} in {folder}"
        )
    return found


def _is_copy(path: str, owner: str, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a bias is another copy, or the base's, of one saved with its module: ``bias: all`` has all three."""
    copy, _, inner = path.removeprefix(f"{owner}.").partition(".")
    deeper = inner.partition(".")[2]  # without the set's name, which PEFT leaves in where the module has modules
    return (
        copy in ("modules_to_save", "original_module")
        and "bias" in inner
        and any(f"{PREFIX}{owner}.{name}" in tensors for name in (inner, deeper))
    )


MAX_EXPRESSIONS = 2000  # each is tried on each module; names, of which a model can have more, are looked up
NAME = re.compile(r"(?:[\w-]|\\[.-])+")  # an expression that matches itself alone


class _Pattern:
    """Per-module values as PEFT resolves them: the first key that matches the end of a name, or the global value."""

    def __init__(self, config: Mapping[str, Any], pattern: str, default: str) -> None:
        self._what = f"{pattern} and {default}" if pattern else default
        self._default = config.get(default)
        self._names: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, _Expression, Any]] = []
        for place, (key, value) in enumerate((config[pattern] if pattern else {}).items()):
            if NAME.fullmatch(key):
                self._names.setdefault(key.replace("\\", ""), (place, value))
                continue
            if len(self._expressions) == MAX_EXPRESSIONS:
                raise ValueError(
                    f"{pattern} must hold at most {MAX_EXPRESSIONS} expressions, got more. Write names, with \\. for"
                    " a dot."
                )
            try:
                self._expressions.append((place, _Expression(key), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{pattern} must hold regular expressions, got {key[:100]!r}: {str(error)[:100]}"
                ) from None
            except ValueError as error:
                raise ValueError(f"{pattern} must hold plain patterns, got {error}") from None

    def value(self, name: str) -> float:
        """Return the value for a module."""
        value = self._first(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
            raise ValueError(f"{self._what} must be finite numbers other than 0, got {repr(value)[:40]} for {name!r}")
        return float(value)

    def _first(self, name: str) -> Any:  # noqa: ANN401
        """Return what the first key that matches says; expressions that come after a name are not tried."""
        tails = [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]
        named = [self._names[tail] for tail in tails if tail in self._names]
        place, value = min(named, key=lambda each: each[0], default=(math.inf, self._default))
        earlier = (other for at, key, other in self._expressions if at < place and key.matches(name))
        return next(earlier, value)


MAX_WAYS = 10**7  # of matching one name with one pattern; some take half a second to try


class _Expression:
    """A regular expression by somebody else, which matches the end of a name; what could take long is refused.

    Raises:
        ValueError: if a group is repeated, or is more than ``(…)``, ``(?:…)`` or a look-ahead.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        if len(key) > MAX_PATTERN:
            raise ValueError(f"one of {len(key)} characters: {key[:100]!r}")
        plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", key, flags=re.DOTALL)
        if re.search(r"\)[*+{]", plain):  # takes exponential time
            raise ValueError(f"a repeated group in {key[:100]!r}")
        if re.search(r"\(\?(?![:=!])", plain):  # whose flags may hide one
            raise ValueError(f"a special group in {key[:100]!r}")
        self._compiled = re.compile(rf"(.*\.)?({key})$")
        plain = plain.replace("(?", "(")
        self._repeats = len(re.findall(r"[*+{]", plain))
        self._choices = 2 ** plain.count("?")
        while "(" in plain:  # innermost groups first; alternatives of one group add up, those of several multiply
            inner, count = re.subn(r"\(([^()]*)\)", self._count, plain)
            if not count:
                break
            plain = inner
        self._choices *= plain.count("|") + 1

    def _count(self, group: re.Match[str]) -> str:
        self._choices *= group[1].count("|") + 1
        return ""

    def matches(self, name: str) -> bool:
        """Tell whether it matches.

        Returns:
            Whether it does.

        Raises:
            ValueError: if there are too many ways in which it might.
        """
        ways = math.comb(len(name) + self._repeats + 1, self._repeats + 1) * self._choices
        if self._repeats + self._choices > 1 and ways > MAX_WAYS:
            raise ValueError(
                f"patterns must match in few ways, got {self._key[:100]!r} for {name!r}. Write names instead."
            )
        return self._compiled.match(name) is not None


MAX_PATTERN = 5000
