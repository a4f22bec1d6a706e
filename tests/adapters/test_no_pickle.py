"""There is no reader for pickled data, no remote code and no evaluated text in any source of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(source: str) -> list[str]:
    """List what the source imports or calls that it must not, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in MODULES:
                names = [node.module]
            names += [full for alias in node.names if (full := f"{node.module}.{alias.name}") in CALLS]
        elif isinstance(node, ast.Attribute) and _dotted(node) in CALLS:
            names = [_dotted(node)]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                names = [node.func.id]
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in {"trust_remote_code", "allow_pickle"} and not is_false:
                    names.append(keyword.arg)
        found += [f"{name}, line {node.lineno}" for name in names]
    return found


def test_there_are_sources_to_scan() -> None:
    assert any(path.match("flowra_adapters/peft_reader.py") for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_reads_no_pickle_and_runs_no_text(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.memory",
        "from dill import loads",
        "from torch import load",
        "torch.load('x')",
        "reader = torch.load",
        "torch.save(x, 'y')",
        "np.load('x')",
        "eval('1')",
        "exec(text)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=flag)",
        "f(allow_pickle=True)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert len(forbidden(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "# torch.load",
        "'''pickle'''",
        "f(trust_remote_code=False)",
        "re.compile('x')",
        "x = 'torch.load'",
    ],
)
def test_the_scan_lets_pass(source: str) -> None:
    assert forbidden(source) == []
