"""validate: were the estimators right? Rank is taken away from the trained probe, and the held-out loss is looked at.

Beside the chain of stages: nothing that is shipped depends on it.
"""

from pathlib import Path

from flowra_adapters import load_adapter
from flowra_allocation import flow_spectrum
from flowra_analysis import read_profile
from flowra_pipelines.learning_rate import with_learning_rate
from flowra_pipelines.report import profile_report
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.calibrate import read_grams
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.validation import validation, write_validation
from flowra_pipelines.validation_runs import run_ablations

__all__ = ["validate"]


def validate(config: RunConfig, folder: Path) -> StageResult:
    """Do the ablations of the run's probe; write ``validation.json`` and ``report.html``."""
    config = with_learning_rate(config, folder.parent)
    setting = load_setting(config)
    calibrated = folder.parent / "calibrate"
    profile = read_profile(calibrated)
    model = base_model(config, setting)
    load_adapter(model, calibrated / "adapter")
    ablations = run_ablations(
        config,
        setting,
        model,
        {name: flow_spectrum(gram) for name, gram in read_grams(calibrated).items()},
        {name: module.statistics["psi"] for name, module in profile.modules.items()},
        examples=config.validation.examples,
        retrained=config.validation.retrained,
    )
    content = validation(
        profile,
        ablations,
        costs={
            key.removeprefix("cost_"): float(value)
            for key, value in profile.provenance.items()
            if key.startswith("cost_")
        },
        provenance={"examples": config.validation.examples, "seed": config.seed},
        seed=config.seed,
    )
    write_validation(content, folder)
    figures, page = profile_report(profile, content)
    (folder / "report.html").write_text(page, encoding="utf-8")
    summary = {}
    metrics = []
    for name, estimator in content["estimators"].items():
        found = {key: each for key, each in estimator["spearman"].items() if each is not None}
        metrics += [(f"spearman/{name}/{key}", float(each["value"]), 0) for key, each in found.items()]
        summary[f"Spearman of {name}"] = ", ".join(f"{key} {each['value']:.2f}" for key, each in found.items())
    return StageResult(metrics=metrics, figures=figures, summary=summary)
