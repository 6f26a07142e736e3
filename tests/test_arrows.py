"""The tree's imports point the way the design says. Reads source files only: nothing is imported here."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "cluster", "deployments", "monitoring", "benchmarks")

MAY_IMPORT = {
    "engine": set(),
    "cluster": {"engine", "monitoring"},
    "deployments": {"cluster", "engine", "monitoring"},
    "monitoring": {"engine"},
    "benchmarks": {"cluster", "deployments", "engine", "monitoring"},
}
PLAIN_RESULTS = {"engine.batch", "engine.sampling_params", "engine.sequence", "engine.stats"}
"""All of the engine that monitoring may see."""
TENSOR_SIDE = ("engine.models", "engine.kernels", "engine.quant", "engine.parallel", "engine.runner", "engine.sampler")
TENSOR_FREE = (
    "engine.scheduler",
    "engine.policy",
    "engine.parts",
    "engine.kv.pages",
    "engine.sequence",
    "engine.batch",
    "engine.batching",
    "engine.lanes",
    "engine.offload",
    "engine.prefixes",
    "engine.kv.tier",
    "engine.kv.costs",
    "engine.config",
    "engine.ahead",
    "engine.needs",
)
FOREIGN_TO_ENGINE = {"ray", "fastapi", "starlette", "prometheus_client"}


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute dotted name."""

    name: str
    line: int
    at_import: bool
    """Whether it runs when the module is imported: neither inside a function nor for type checkers only."""


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    num_lines: int
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def place(self, found: Import) -> str:
        return f"{self.path.relative_to(ROOT)}:{found.line} imports {found.name}"


@cache
def modules() -> dict[str, Module]:
    """Every module of the packages, by dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = {_dotted(path) for path in paths}
    return {_dotted(path): _read(path, names) for path in paths}


def within(name: str, *packages: str) -> bool:
    """Whether the module is one of these or inside one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path, names: set[str]) -> Module:
    source = path.read_text()
    tree = ast.parse(source, str(path))
    here = _dotted(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    return Module(here, path, tree, len(source.splitlines()), tuple(_imports(tree, package, names, at_import=True)))


def _imports(node: ast.AST, package: str, names: set[str], *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_import)
        elif isinstance(child, ast.ImportFrom):
            source = imported_from(child, package)
            # `from engine import scheduler` imports a module, `from engine.scheduler import Scheduler` a name of one.
            for alias in child.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in names else source, child.lineno, at_import)
        else:
            yield from _imports(child, package, names, at_import=at_import and not _is_deferred(child))


def imported_from(node: ast.ImportFrom, package: str) -> str:
    """The absolute name of what a `from ... import` in a module of `package` reads from."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def reaches(start: str) -> dict[str, tuple[str, ...]]:
    """Everything that importing a module imports, each with one chain of imports that leads there."""
    chains: dict[str, tuple[str, ...]] = {start: (start,)}
    queue = [start]
    while queue:
        here = queue.pop(0)
        immediate = [found for found in modules()[here].imports if found.at_import] if here in modules() else []
        for name in (name for found in immediate for name in _with_parents(found.name)):
            if name not in chains:
                chains[name] = (*chains[here], name)
                queue.append(name)
    return chains


def _with_parents(name: str) -> Iterator[str]:
    """Importing a.b.c runs a and a.b too."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def test_the_tree_is_read() -> None:
    assert {"engine.sampler", "engine.batch", "deployments.config"} <= modules().keys()
    assert any(found.name == "engine.batch" for found in modules()["engine.sampler"].imports)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    forbidden = set(PACKAGES) - MAY_IMPORT[package] - {package}
    wrong = [
        module.place(found)
        for module in modules().values()
        for found in module.imports
        if module.package == package and within(found.name, *forbidden, "tests")
    ]
    assert wrong == []


def test_monitoring_sees_only_plain_results_of_the_engine() -> None:
    wrong = [
        module.place(found)
        for module in modules().values()
        for found in module.imports
        if module.package == "monitoring" and within(found.name, "engine") and found.name not in PLAIN_RESULTS
    ]
    assert wrong == []


def test_engine_knows_no_cluster_no_http_and_no_metrics_library() -> None:
    wrong = [
        module.place(found)
        for module in modules().values()
        for found in module.imports
        if module.package == "engine" and within(found.name, *FOREIGN_TO_ENGINE)
    ]
    assert wrong == []


@pytest.mark.parametrize("side", [*TENSOR_FREE, *sorted(PLAIN_RESULTS)])
def test_deciding_side_imports_no_torch(side: str) -> None:
    """Not even through another module: the scheduler's tests must not pay for torch, nor its plans wait for it."""
    for name in modules():
        if within(name, side):
            chains = {target: chain for target, chain in reaches(name).items() if within(target, "torch")}
            assert not chains, " -> ".join(next(iter(chains.values())))


@pytest.mark.parametrize(
    "pure",
    [
        "cluster.planner",
        "cluster.shards.placement",
        "cluster.shards.cut",
        "engine.parallel.slices",
        "engine.parallel.place",
        "engine.parallel.part",
    ],
)
def test_planning_imports_neither_torch_nor_ray(pure: str) -> None:
    """Anybody may ask for a plan, on a machine that has neither."""
    for name in modules():
        if within(name, pure):
            chains = [chain for target, chain in reaches(name).items() if within(target, "torch", "ray", "numpy")]
            assert not chains, " -> ".join(chains[0])


def test_tensor_side_never_imports_the_scheduler() -> None:
    for name in modules():
        if within(name, *TENSOR_SIDE, "engine.sampling"):
            chain = reaches(name).get("engine.scheduler") or reaches(name).get("engine.policy")
            assert chain is None, " -> ".join(chain or ())


def test_no_import_cycles() -> None:
    """Deferred imports count: a cycle that is hidden in a function is a cycle."""
    graph = {
        name: {found.name for found in module.imports if found.name in modules() and found.name != name}
        for name, module in modules().items()
    }
    assert find_cycle(graph) is None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of a directed graph, as the path that closes it, or None."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return None
        for target in sorted(graph[node]):
            if cycle := visit(target, [*path, node]):
                return cycle
        finished.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def test_every_module_says_what_it_owns() -> None:
    silent = [
        name for name, module in modules().items() if module.num_lines > 15 and not ast.get_docstring(module.tree)
    ]
    assert silent == []


class TestTheReader:
    """The rules above are only as good as what reads the imports."""

    @pytest.mark.parametrize(
        ("source", "package", "expected"),
        [
            ("from . import x", "a.b", "a.b"),
            ("from .c import x", "a.b", "a.b.c"),
            ("from .. import x", "a.b", "a"),
            ("from ..c.d import x", "a.b", "a.c.d"),
            ("from c import x", "a.b", "c"),
        ],
    )
    def test_relative_imports_become_absolute(self, source: str, package: str, expected: str) -> None:
        node = ast.parse(source).body[0]
        assert isinstance(node, ast.ImportFrom)
        assert imported_from(node, package) == expected

    def test_modules_are_told_from_names_and_deferred_imports_from_immediate_ones(self) -> None:
        source = "from .. import m, n\nif TYPE_CHECKING:\n    import t\ndef f():\n    import d\nclass C:\n    import e"
        found = list(_imports(ast.parse(source), "a.b", {"a", "a.m"}, at_import=True))
        assert [(i.name, i.at_import) for i in found] == [
            ("a.m", True),
            ("a", True),
            ("t", False),
            ("d", False),
            ("e", True),
        ]

    def test_cycles_are_found(self) -> None:
        assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
        assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
