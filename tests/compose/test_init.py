import types

import flowra_compose


def test_all_lists_exactly_the_public_names() -> None:
    public = {
        name
        for name, value in vars(flowra_compose).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "version"
    }
    assert public == set(flowra_compose.__all__)
