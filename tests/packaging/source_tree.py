"""Our own sources as syntax trees: which files there are, and what each one imports. Runs none of them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "client", "kernels", "worker")


@dataclass(frozen=True, slots=True)
class Import:
    """One import: the dotted name of the module, of ours also the name taken from it (which may be a module)."""

    module: str
    line: int


def package_files(folder: str) -> list[Path]:
    """The Python files of one of our packages."""
    return sorted((ROOT / folder).rglob("*.py"))


def script_files() -> list[Path]:
    """The Python files of scripts/, also those that only a first line `#!...python` tells."""
    found = []
    for path in sorted((ROOT / "scripts").rglob("*")):
        if path.suffix == ".py" or (path.is_file() and not path.suffix and "python" in first_line(path)):
            found.append(path)
    return found


def first_line(path: Path) -> str:
    """The first line of a text file."""
    with path.open(encoding="utf-8") as file:
        return file.readline()


def module_name(path: Path) -> str:
    """`broker/core.py` -> `penstock.broker.core`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("penstock", *parts)).removesuffix(".__init__")


def imports_of(path: Path) -> list[Import]:
    """Every module that a file names in an import, at any depth, also in `importlib.import_module("...")`."""
    is_package = path.name == "__init__.py"
    return list(find_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)), module_name(path), is_package))


def find_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """The imports of one module's syntax tree; relative ones resolved against its dotted name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                base = _resolve(node, module, is_package)
                if base.split(".")[0] == "penstock":
                    yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
                else:
                    yield Import(base, node.lineno)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, node.lineno)


def _resolve(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])
