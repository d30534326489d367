"""The list of packages, derived from the one mapping in pyproject.toml.

`packages.find` cannot add a prefix, so each (name, folder) of `[tool.setuptools.package-dir]` gives the name itself and
`name.sub` for every package inside the folder. New modules and subpackages need no declaration.
"""

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup

root = Path(__file__).parent
mapping = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
packages = []
for name, folder in mapping.items():
    inner = find_namespace_packages(str(root / folder), exclude=["__pycache__", "*.__pycache__"])
    packages += [name, *(f"{name}.{sub}" for sub in inner)]

setup(packages=packages)
