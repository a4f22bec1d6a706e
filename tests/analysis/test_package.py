from types import ModuleType

import flowra_analysis


def test_all_is_what_the_package_offers() -> None:
    offered = {
        name
        for name, value in vars(flowra_analysis).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "version"
    }
    assert offered == set(flowra_analysis.__all__)
    assert flowra_analysis.__version__
