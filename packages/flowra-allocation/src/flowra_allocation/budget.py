"""What a budget means: the largest number of adapter parameters, heads not counted."""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

__all__ = ["parse_budget"]

BYTES_PER_PARAMETER = 4
COUNTS: Mapping[str, int] = MappingProxyType({"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9})
SIZES: Mapping[str, int] = MappingProxyType({
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
})  # fmt: skip
FORMS = "'0.1%', 22713, '300k', '1.5M', '2MB', 'like r=8 on q,v' or 'same as <plan or adapter>'"


def parse_budget(
    budget: str | int,
    *,
    base_parameters: int,
    unit_cost: Callable[[Sequence[str]], int] | None = None,
    parameters_of: Callable[[str], int] | None = None,
) -> int:
    """Turn a budget into a number of parameters (docs/methods.md, section 5).

    ========================  =======================================================================================
    ``22713``, ``"22_713"``   parameters
    ``"300k"``, ``"1.5M"``    thousands (k or K), millions (M) or billions (G) of parameters; the result must be whole
    ``"0.1%"``                ⌊share · N_base⌋
    ``"500kB"``, ``"2 MB"``   what fits into so many bytes of float32, ⌊bytes / 4⌋; kB (or KB), MB and GB are decimal,
                              KiB, MiB and GiB binary
    ``"like r=8 on q,v"``     as many as LoRA of rank 8 has on these layers, r · Σ (m + n); also ``rank=8``
    ``"same as runs/a"``      as many as the plan or adapter there has
    ========================  =======================================================================================

    Spaces around a number and its unit do not matter. Upper and lower case do: ``m``, ``mb`` and ``Mb`` mean something
    else, and ``B`` alone could be bytes or billions. No parameter is lost to binary rounding.

    Args:
        budget: one of the above.
        base_parameters: N_base ≥ 1, number of parameters of the base model.
        unit_cost: maps names or patterns of layers to Σ (m + n) over the layers they mean, and raises ValueError for
            one that means none; needed for ``like …`` only.
        parameters_of: maps a path to the adapter parameters of the plan or adapter that is there, and raises
            ValueError where there is none; needed for ``same as …`` only.

    Returns:
        P ≥ 1.

    Raises:
        ValueError: if the text is not a budget, it is not positive, or it needs ``unit_cost`` or
            ``parameters_of``.

    Example:
        >>> layers = {"q": 768 + 768, "v": 768 + 768}  # m + n
        >>> def parse(budget):
        ...     cost = lambda names: sum(layers[name] for name in names)
        ...     return parse_budget(budget, base_parameters=22_713_216, unit_cost=cost)
        >>> parse(22713) == parse("22_713") == parse("22.713k") == parse("0.1%")
        True
        >>> parse("300k"), parse("300 K"), parse("1.5M"), parse("2G")
        (300000, 300000, 1500000, 2000000000)
        >>> parse("500kB") == parse("0.5 MB") == parse("0.0005GB") == parse("125k")
        True
        >>> parse("1KiB"), parse("1MiB"), parse("1GiB"), parse("1.001kB")
        (256, 262144, 268435456, 250)
        >>> parse("like r=8 on q,v") == 8 * (768 + 768) * 2
        True
        >>> parse_budget("same as plan.json", base_parameters=1, parameters_of={"plan.json": 57_600}.__getitem__)
        57600
    """
    text = str(budget).strip()
    if text.startswith("same"):
        return _same(text, parameters_of)
    if text.startswith("like"):
        return _like(text, unit_cost)
    match = re.fullmatch(r"(\d+(?:_\d+)*\.?\d*|\.\d+)\s*([^\d\s._]*)", text, flags=re.ASCII)
    if isinstance(budget, bool) or match is None:
        raise ValueError(f"budget must be like {FORMS}, got {budget!r}")
    number, unit = Fraction(match[1].replace("_", "")), match[2]
    if unit == "%":
        parameters = number * base_parameters / 100
    elif unit in SIZES:
        parameters = number * SIZES[unit] / BYTES_PER_PARAMETER
    elif unit in COUNTS:
        parameters = number * COUNTS[unit]
        if parameters.denominator != 1 or (not unit and "." in match[1]):  # 22.000 may be meant as 22,000
            hint = "" if unit else " For a percentage add '%'."
            raise ValueError(f"budget must be a whole number of parameters, got {budget!r}.{hint}")
    else:
        units = ["%", *filter(None, COUNTS), *SIZES]
        near = [each for each in units if each.casefold() == unit.casefold()]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"The units are {', '.join(units)}."
        raise ValueError(f"budget must be like {FORMS}, got {budget!r}: {match[1]} of the unit {unit!r}. {hint}")
    if parameters < 1:
        raise ValueError(f"budget must be at least one parameter, got {budget!r} of {base_parameters}")
    return int(parameters)


def _like(text: str, unit_cost: Callable[[Sequence[str]], int] | None) -> int:
    match = re.fullmatch(r"like\s+(?:r|rank)\s*=\s*(\d+)\s+on\s+(\S.*)", text, flags=re.ASCII)
    names = [name.strip() for name in match[2].split(",")] if match else []
    if match is None or int(match[1]) < 1 or not all(names):
        raise ValueError(f"budget must be 'like r=<rank ≥ 1> on <names>', the names with commas between, got {text!r}")
    if unit_cost is None:
        raise ValueError(f"budget must be a number where the model's layers are unknown, got {text!r}. Give unit_cost.")
    return int(match[1]) * unit_cost(names)


def _same(text: str, parameters_of: Callable[[str], int] | None) -> int:
    match = re.fullmatch(r"same\s+as\s+(\S.*)", text)
    if match is None:
        raise ValueError(f"budget must be 'same as <path of a plan or an adapter>', got {text!r}")
    if parameters_of is None:
        raise ValueError(f"budget must be a number where files are not looked at, got {text!r}. Give parameters_of.")
    parameters = parameters_of(match[1])
    if parameters < 1:
        raise ValueError(f"budget must be at least one parameter, got {text!r}, which has {parameters}")
    return parameters
