"""One-way imports, one file for each outside library, files of a readable size."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pldr_jax"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

BASE = {"config", "bucket", "copies", "files", "terminal", "plots", "partition", "hosts"}
ABOVE = BASE | {"model", "data", "runs", "inference", "interop", "training", "api"}
MAY_IMPORT = {
    "config": set(),
    "bucket": {"config"},
    "files": {"config", "bucket"},
    "copies": {"config", "bucket", "files"},
    "terminal": set(),
    "plots": set(),
    "partition": {"config"},
    "hosts": {"config", "files", "terminal"},
    "model": {"config", "partition"},
    "data": BASE,
    "runs": BASE | {"model"},
    "inference": BASE | {"model"},
    "interop": BASE | {"model", "data", "runs"},
    "training": BASE | {"model", "data", "runs", "inference", "interop"},
    "api": BASE | {"model", "data", "runs", "inference", "interop"},
    "evaluation": {"config", "copies", "files", "terminal", "inference", "api"},
    "analysis": BASE | {"model", "data", "runs", "inference", "interop", "training", "api"},
    "verify": BASE | {"model", "data", "runs", "inference", "interop", "training", "api"},
    "serve": BASE | {"model", "data", "inference", "training", "api"},
    "cli": BASE
    | {
        "model",
        "data",
        "runs",
        "inference",
        "interop",
        "training",
        "api",
        "evaluation",
        "analysis",
        "serve",
        "verify",
    },
    "freeze": {"cli"},  # python -m pldr_jax.freeze
    "": {"api", "config", "inference"},
}
"""What each part may import, besides itself; "" is the package's own __init__."""

EXTRA: dict[str, set[str]] = {
    "interop/__main__.py": {"cli"},  # nothing imports it
    "data/__main__.py": {"cli"},
    "analysis/__main__.py": {"cli"},
    "serve/__main__.py": {"cli"},
    "verify/__main__.py": {"cli"},
}


def part(file: str) -> str:
    """`training/loop.py` -> `training`, `config.py` -> `config`, `__init__.py` -> ""."""
    return "" if file == "__init__.py" else file.split("/")[0].removesuffix(".py")


def module_name(file: str) -> str:
    name = "pldr_jax." + file.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_name(file) for file in FILES}


def imports(file: str, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; with `everywhere` also those inside functions."""
    tree = ast.parse(FILES[file].read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else str(node.module))
    return found


def attributes(file: str) -> set[str]:
    """Every `name.attribute` a file reads."""
    nodes = ast.walk(ast.parse(FILES[file].read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


def test_the_files_are_found() -> None:
    assert {part(file) for file in FILES} == set(MAY_IMPORT)
    assert "pldr_jax.model.decoder" in imports("api.py")
    assert "pldr_jax.interop.weights" in imports("api.py")
    assert "pldr_jax.interop.weights" not in imports("api.py", everywhere=False)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file: str) -> None:
    allowed = MAY_IMPORT[part(file)] | {part(file)} | EXTRA.get(file, set())
    for name in imports(file):
        if name == "pldr_jax" and file == "__init__.py":
            continue
        if name.split(".")[0] == "pldr_jax":
            assert name != "pldr_jax", f"{file}: imports the package, not a module of it"
            assert name.split(".")[1] in allowed, f"{file}: imports {name}"


def test_there_are_no_import_cycles() -> None:
    """Not even through imports inside functions."""
    graph = {
        module_name(file): {name for name in imports(file) if name in MODULES}
        for file in FILES
        if file != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for name in graph.get(module, set()):
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "library,owners",
    [
        ("orbax", {"runs/checkpoint.py"}),
        ("grain", {"data/pipeline.py"}),
        ("matplotlib", {"plots.py"}),
        ("array_record", {"data/shards/records.py"}),
        ("torch", {"interop/pth.py"}),
        ("huggingface_hub", {"runs/hub.py"}),
        ("fsspec", {"bucket.py"}),
    ],
)
def test_few_files_own_each_library(library: str, owners: set[str]) -> None:
    users = {file for file in FILES for name in imports(file) if name.split(".")[0] == library}
    assert users == owners


def test_the_harness_is_known_to_one_file() -> None:
    """Others ask at most whether it is there, and import that file inside functions."""
    users = {f for f in FILES for name in imports(f) if name.split(".")[0] == "lm_eval"}
    assert users == {"evaluation/harness.py", "cli/training/tasks.py"}
    owner = "pldr_jax.evaluation.harness"
    assert not [file for file in FILES if owner in imports(file, everywhere=False)]


def test_the_command_line_is_read_in_one_place() -> None:
    """The entry point takes sys.argv and hands it to flags.py, which alone knows what it means."""
    assert {file for file in FILES if "sys.argv" in attributes(file)} == {"cli/common.py"}
    libraries = {"argparse", "optparse", "getopt", "absl.flags"}
    # Grain has flags of its own; data/pipeline.py says that there are none for it.
    assert {f for f in FILES if imports(f) & libraries} <= {"cli/options.py", "data/pipeline.py"}


def test_config_files_are_read_by_the_config_alone() -> None:
    readers = {file for file in FILES if "pldr_jax.config.gin" in imports(file)}
    assert readers == {"config/load.py", "cli/options.py"}
    for file in FILES:
        assert "gin" not in {name.split(".")[0] for name in imports(file)}, file


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_over_400_lines(file: str) -> None:
    assert len(FILES[file].read_text().splitlines()) <= 400
