"""Imports point one way, and every module says what it is for."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = ("fastapi", "starlette", "uvicorn", "httpx")

# importer: what it must not import, except what
FORBIDDEN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "xorl.server": (
        ("torch", "xorl.engine", "xorl.sync", "xorl.sampler", "xorl_kernels"),
        ("xorl.engine.client", "xorl.engine.commands", "xorl.sync.receiver"),
    ),
    "xorl.engine": (("fastapi", "starlette", "uvicorn", "xorl.sampler"), ()),
    "xorl.engine.commands": (("torch", *HTTP), ()),
    "xorl.engine.client": (("torch", *HTTP), ()),
    "xorl.engine.scheduler": (("torch", *HTTP), ()),
    "xorl.sync": (("xorl.engine", "xorl.sampler"), ("xorl.engine.commands",)),
    "xorl.sync.plan": (("torch", *HTTP), ()),
    "xorl.sync.forecast": (("torch", *HTTP), ()),
    "xorl.sampler": (("xorl.engine",), ("xorl.engine.attention", "xorl.engine.lora", "xorl.engine.model")),
    "xorl.demo": (("xorl", "xorl_kernels"), ("xorl.demo",)),
    "xorl.types": (("torch", "xorl"), ()),
    "xorl.errors": (("torch", "xorl"), ()),
    "xorl_kernels": (("xorl",), ()),
}
WITHOUT_TORCH = ("xorl.server", "xorl.cli", "xorl.types", "xorl.config", "xorl.errors", "xorl.engine.commands")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in ("xorl", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports(module: str, *, at_import_time: bool = False) -> set[str]:
    """Every module that `module` imports; at import time only, or inside functions and for type checkers too."""
    return {name for node in statements(tree(module), at_import_time) for name in named_by(node)}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def statements(node: ast.AST, at_import_time: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (at_import_time and (late or for_types)):
            yield from statements(child, at_import_time)


def named_by(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"a relative import of {node.module}"
    package = node.module or ""
    return [f"{package}.{a.name}" if f"{package}.{a.name}" in MODULES else package for a in node.names]


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_point_one_way(importer: str):
    forbidden, allowed = FORBIDDEN[importer]
    wrong = [
        f"{module} -> {name}"
        for module in MODULES
        if is_within(module, importer)
        for name in sorted(imports(module))
        if any(is_within(name, package) for package in forbidden)
        and not any(is_within(name, package) for package in allowed)
    ]
    assert not wrong, wrong


def test_only_the_command_line_knows_the_server():
    importers = {module for module in MODULES if any(is_within(name, "xorl.server") for name in imports(module))}
    assert not {module for module in importers if not is_within(module, "xorl.server")} - {"xorl.cli"}


@pytest.mark.parametrize("start", WITHOUT_TORCH)
def test_torch_is_not_loaded_through_others(start: str):
    """The control plane starts in a blink, whatever the modules it imports import in turn."""
    reached = {module: module for module in MODULES if is_within(module, start)}
    waiting = list(reached)
    while waiting:
        module = waiting.pop()
        for name in imports(module, at_import_time=True):
            assert not is_within(name, "torch"), f"{reached[module]} -> torch"
            packages = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]  # a package runs its __init__
            for package in packages:
                if package in MODULES and package not in reached:
                    reached[package] = f"{reached[module]} -> {package}"
                    waiting.append(package)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_opens_with_a_docstring(module: str):
    has_code = bool(tree(module).body)
    assert not has_code or ast.get_docstring(tree(module)), f"{module} does not say what it is for"


def test_kernels_hide_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide the `kernels` that transformers imports
