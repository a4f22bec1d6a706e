from types import ModuleType

import flowra_allocation


def test_all_is_what_the_package_offers() -> None:
    offered = {
        name
        for name, value in vars(flowra_allocation).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "version"
    }
    assert offered == set(flowra_allocation.__all__)
    assert flowra_allocation.__version__
