"""Imports point one way, the base packages need the base install only, and importing them never brings torch."""

import ast
import subprocess
import sys
import tomllib

import pytest
from source_tree import PACKAGES, ROOT, find_imports, imports_of, package_files

OURS = tuple(f"penstock.{name}" for name in PACKAGES)

# What the other packages may use of the broker: the words of the protocol, never the core, the policy or the server.
# And how memory is shared.
_WORDS = (
    "address", "columns", "curve", "detectors", "errors", "keys", "layout", "packed", "protocol", "settings", "ways", "wire",
)  # fmt: skip
_MEMORY = ("arena", "peer_memory", "segments", "shared")
PROTOCOL = tuple(f"penstock.broker.{name}" for name in (*_WORDS, *_MEMORY))

# What every program has: log lines, and words to a service manager. And what a test can arm in all of them.
PROCESS = ("penstock.broker.logs", "penstock.broker.notify")
FAILPOINTS = "penstock.broker.failpoints"

ALLOWED = {
    "broker": ("penstock.broker",),
    "client": ("penstock.client", FAILPOINTS, *PROTOCOL),
    "kernels": ("penstock.kernels",),
    "worker": ("penstock.worker", "penstock.kernels", FAILPOINTS, *PROCESS, *PROTOCOL),
}

# Import names of the base install's distributions that differ from the distributions' own.
IMPORT_NAMES = {"pyzmq": "zmq"}


# Imported only when asked for, with an error that names the extra.
OPTIONAL = {("broker/simulator/plot.py", "matplotlib.pyplot"), ("broker/simulator/plot.py", "matplotlib")}


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def wrong_directions(package: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in package_files(package)
        for found in imports_of(path)
        if is_within(found.module, ("penstock", *PACKAGES)) and not is_within(found.module, ALLOWED[package])
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    assert package_files(package)
    assert wrong_directions(package) == []


@pytest.mark.parametrize("package", ["broker", "client"])
def test_broker_and_client_use_the_base_install_only(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {requirement.split(">")[0] for requirement in project["dependencies"]}
    allowed = {IMPORT_NAMES.get(name, name) for name in base} | sys.stdlib_module_names | {"penstock"}
    assert "torch" not in allowed
    foreign = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in package_files(package)
        for found in imports_of(path)
        if found.module.split(".")[0] not in allowed and (str(path.relative_to(ROOT)), found.module) not in OPTIONAL
    ]
    assert foreign == []


def test_the_brokers_init_is_empty() -> None:
    assert (ROOT / "broker" / "__init__.py").read_bytes() == b""


def test_there_is_no_penstock_init() -> None:
    assert not (ROOT / "__init__.py").exists()  # it would close the namespace to plugins of others


@pytest.mark.parametrize("module", ["penstock.client", "penstock.client.cli", "penstock.broker.core"])
def test_importing_leaves_torch_out(module: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "safetensors"}
    program = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_kernels_is_not_found_as_a_top_level_package() -> None:
    program = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    for command in ([sys.executable, "-P", "-c", program], [sys.executable, "-c", program]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
        assert done.stdout.strip() == "None"
    assert all(entry not in sys.path for entry in (str(ROOT), str(ROOT / "tests")))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", "torch.nn"),
        ("def f():\n    import torch", "torch"),
        ("from torch import nn", "torch"),
        ("import importlib\nimportlib.import_module('torch')", "torch"),
        ("from penstock.broker import core", "penstock.broker.core"),
        ("from ..broker.core import Core", "penstock.broker.core.Core"),
        ("from . import cli", "penstock.client.cli"),
    ],
)
def test_the_finder_sees_every_form_of_import(source: str, expected: str) -> None:
    found = find_imports(ast.parse(source), "penstock.client.sdk", is_package=False)
    assert expected in [one.module for one in found]
