"""What a budget means: the largest number of adapter parameters, heads not counted."""

import re
from fractions import Fraction

__all__ = ["parse_budget"]


def parse_budget(budget: str | int, *, base_parameters: int) -> int:
    """Turn a budget into a number of parameters, P = ⌊budget · N_base⌋ for a percentage (docs/methods.md, section 5).

    Args:
        budget: a percentage of the base such as ``"0.1%"``, or a number of parameters such as ``22713``, ``"22713"``
            or ``"22_713"``.
        base_parameters: N_base ≥ 1, number of parameters of the base model.

    Returns:
        P ≥ 1.

    Raises:
        ValueError: if the text is not a budget, or it is not positive.

    Example:
        >>> parse_budget("0.1%", base_parameters=22_713_216)
        22713
    """
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*\.?\d*|\.\d+)\s*(%?)\s*", str(budget))
    if isinstance(budget, bool) or match is None:
        raise ValueError(f"budget must be a percentage like '0.1%' or a number of parameters, got {budget!r}")
    number, percent = str(match[1]), str(match[2])
    if percent:  # exact: 0.1 % must not lose a parameter to binary rounding
        parameters = int(Fraction(number.replace("_", "")) * base_parameters / 100)
    elif "." in number:
        raise ValueError(f"budget must be a whole number of parameters, got {budget!r}. For a percentage add '%'.")
    else:
        parameters = int(number)
    if parameters < 1:
        raise ValueError(f"budget must be at least one parameter, got {budget!r} of {base_parameters}")
    return parameters
