"""Promises about the package as a whole: who imports whom, what it never does, what it exports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fewstep.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Part -> the parts that it may import. "fewstep" is the package's own `__init__`: two constants.
BASE = {"errors", "imports", "outputs", "random"}
BELOW_PIPELINES = BASE | {"diffusion", "checkpoints", "ops", "models", "schedulers"}
MAY_IMPORT = {
    "errors": set(),
    "imports": set(),
    "outputs": set(),
    "metadata": set(),
    "random": {"errors"},
    "diffusion": BASE,
    "checkpoints": BASE,
    "kernels": {"errors"},
    "ops": {"errors", "kernels"},
    "models": BASE | {"diffusion", "checkpoints", "ops"},
    "schedulers": BASE | {"diffusion", "checkpoints"},
    "engine": BELOW_PIPELINES | {"kernels"},
    "pipelines": BELOW_PIPELINES | {"engine", "fewstep"},
    "utils": BASE | {"pipelines"},
    "loaders": {"pipelines"},
    "annotate": BASE,
    "training": BELOW_PIPELINES | {"pipelines", "annotate", "fewstep"},
    "evaluation": BELOW_PIPELINES | {"pipelines", "training"},
    "bench": BELOW_PIPELINES | {"pipelines", "fewstep"},
    "server": BELOW_PIPELINES | {"pipelines", "annotate", "metadata", "fewstep"},
    "cli": BELOW_PIPELINES
    | {"pipelines", "utils", "annotate", "metadata", "training", "evaluation", "bench", "server"}
    | {"fewstep"},
    "__main__": {"cli"},
}


def part_of(file: Path) -> str:
    """The folder or the module of the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    package = ["fewstep", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from names if module == "fewstep" else [module]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":
        return  # hands out names of all parts, when they are asked for
    for module in imported(file):
        if module.split(".")[0] != "fewstep":
            continue
        name = module.split(".")[1]
        other = "fewstep" if name in fewstep.__all__ else name
        assert other == part or other in MAY_IMPORT[part], f"{part} must not import {module}"


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part_of(file) for file in MODULES} - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "banned", ["diffusers", "pickle", "dill", "cloudpickle", "shelve", "marshal"]
)
def test_the_package_never_imports(banned: str) -> None:
    assert not [f for f in MODULES for module in imported(f) if module.split(".")[0] == banned]


def test_the_package_never_unpickles() -> None:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) not in ("torch.load", "joblib.load"), file
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, file


def test_every_public_name_is_there() -> None:
    missing = [name for name in fewstep.__all__ if not hasattr(fewstep, name)]
    assert missing == []
    assert set(fewstep.__all__) <= set(dir(fewstep))


def test_the_public_names_that_type_checkers_see_are_those_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    names = {
        alias.asname or alias.name
        for node in ast.walk(block)
        for alias in getattr(node, "names", [])
    }
    lazy = {name for name in fewstep.__all__ if name not in ("EMBEDDED", "__version__")}
    assert names == lazy


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, fewstep; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


DOCUMENTS = [ROOT / "README.md", fewstep.EMBEDDED / "README.md", *(ROOT / "docs").rglob("*.md")]
PAGES = sorted(page for page in DOCUMENTS if page.is_file())
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{index}")
    for page in PAGES
    for index, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_in_the_documents_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "document", "exec"), {"__name__": "__main__"})


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img src=\"([^\"]+)\"")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_in_the_documents_lead_somewhere(page: Path) -> None:
    targets = [a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
