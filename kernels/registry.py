"""Which kernels there are: the built-in ones, those of a user's modules, those of installed distributions.

Knows where kernels are found and how they are constructed; keeps no state: every `load` gives new kernels.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from penstock.kernels.declare import spec_of
from penstock.kernels.errors import RegistryError, SpecError
from penstock.kernels.inputs import StaticValue, as_static
from penstock.kernels.runtime import Kernel

GROUP = "penstock.kernels"

_BUILTIN = {
    "aggregate": "penstock.kernels.aggregate:aggregate",
    "attention": "penstock.kernels.attention:attention",
    "attention_varlen": "penstock.kernels.attention.tasks:attention_varlen_tasks",
    "corpus": "penstock.kernels.corpus:Corpus",
    "embed": "penstock.kernels.embed:Embed",
    "filter": "penstock.kernels.filter:filter_rows",
    "linear": "penstock.kernels.linear:LinearLayer",
    "matmul": "penstock.kernels.matmul:matmul",
    "moe": "penstock.kernels.moe:MoELayer",
    "paged_decode": "penstock.kernels.attention.tasks:paged_decode_tasks",
    "quantized_linear": "penstock.kernels.quantized:QuantizedLinear",
    "sample": "penstock.kernels.sampling:sample_rows",
    "search": "penstock.kernels.search:Search",
    "selective_scan": "penstock.kernels.scan.tasks:selective_scan",
    "sha256": "penstock.kernels.sha256:sha256",
    "simulate": "penstock.kernels.simulate:Simulate",
    "sleep": "penstock.kernels.sleep:Sleep",
    "softmax": "penstock.kernels.softmax:softmax",
    "speculative_verify": "penstock.kernels.sampling:verify_rows",
    "ssd": "penstock.kernels.scan.tasks:ssd",
    "token_transform": "penstock.kernels.tokens:TokenTransform",
    "transform": "penstock.kernels.transform:transform",
}

Options = Mapping[str, Mapping[str, StaticValue]]


def builtin() -> tuple[str, ...]:
    """The names of the built-in kernels; none of them is imported by this."""
    return tuple(sorted(_BUILTIN))


def load(
    modules: Iterable[str] = (),
    *,
    entry_points: bool = True,
    options: Options | None = None,
    only: Iterable[str] | None = None,
) -> dict[str, Kernel]:
    """Every kernel to offer, by name; none has loaded its state yet.

    `modules`: import names, or paths of `.py` files, with decorated kernels. `entry_points`: also those that installed
    distributions name in the group `penstock.kernels`, each a module or a decorated object. `options`: kernel ->
    keyword arguments of its class. `only`: the names to offer, None = all. Raises RegistryError with one line that says
    what to change: two kernels of one name, no such kernel or option, a module without kernels.
    """
    found: dict[str, tuple[Any, str]] = {}
    wanted = None if only is None else set(only)
    for name in builtin():
        if wanted is None or name in wanted:
            _add(found, _builtin_target(name), "the built-in kernels")
    sources = [_from_entry_points()] if entry_points else []
    for target, source in [*(pair for part in sources for pair in part), *_from_modules(modules)]:
        _add(found, target, source)
    names = sorted({*found, *builtin()})
    for name in sorted(wanted or ()):
        if name not in found:
            raise RegistryError(f"there is no kernel {name!r}; there are {', '.join(names)}")
    for name in options or {}:
        if name not in names:
            raise RegistryError(f"options are given for {name!r}, which is no kernel; there are {', '.join(names)}")
    return {
        name: _construct(target, source, (options or {}).get(name, {}))
        for name, (target, source) in sorted(found.items())
        if wanted is None or name in wanted
    }


def get(name: str, **options: StaticValue) -> Kernel:
    """One built-in kernel. Raises RegistryError if there is none of that name."""
    if name not in _BUILTIN:
        raise RegistryError(f"there is no built-in kernel {name!r}; there are {', '.join(builtin())}")
    return _construct(_builtin_target(name), "the built-in kernels", options)


def create(target: Any, **options: StaticValue) -> Kernel:
    """The kernel of one decorated function or class. Raises RegistryError if it is not decorated."""
    return _construct(target, getattr(target, "__module__", "?"), options)


def _builtin_target(name: str) -> Any:
    module, _, attribute = _BUILTIN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _add(found: dict[str, tuple[Any, str]], target: Any, source: str) -> None:
    spec = spec_of(target)
    assert spec is not None
    known = found.setdefault(spec.name, (target, source))
    if known[0] is not target:  # the same object may be reached twice, as a module's import of another
        raise RegistryError(f"two kernels are called {spec.name!r}: one from {known[1]}, one from {source}")


def _kernels_in(module: ModuleType) -> list[Any]:
    return [value for value in vars(module).values() if spec_of(value) is not None]


def _from_modules(names: Iterable[str]) -> Iterator[tuple[Any, str]]:
    for name in names:
        targets = _kernels_in(_import(name))
        if not targets:
            raise RegistryError(f"module {name!r} has no kernels; decorate them with @penstock.kernels.kernel(name)")
        yield from ((target, f"module {name}") for target in targets)


def _import(name: str) -> ModuleType:
    try:
        return _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except SpecError as error:
        raise RegistryError(f"module {name!r}: {error}") from error
    except ModuleNotFoundError as error:
        hint = ": is it installed, or its folder in PYTHONPATH?" if error.name and name.startswith(error.name) else ""
        raise RegistryError(f"module {name!r} cannot be imported: {error}{hint}") from error
    except Exception as error:
        raise RegistryError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.stem.isidentifier() or path.stem in sys.modules:
        raise ImportError(f"the name {path.stem!r} is taken or is no identifier; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _from_entry_points() -> Iterator[tuple[Any, str]]:
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        owner = f" of {point.dist.name}" if point.dist is not None else ""
        source = f"entry point {point.name!r}{owner}"
        try:
            loaded = point.load()
        except Exception as error:
            raise RegistryError(f"{source} ({point.value}) cannot be loaded: {error}") from error
        targets = _kernels_in(loaded) if isinstance(loaded, ModuleType) else [loaded]
        if not targets or spec_of(targets[0]) is None:
            raise RegistryError(f"{source} ({point.value}) is no kernel and no module with kernels")
        yield from ((target, source) for target in targets)


def _construct(target: Any, source: str, options: Mapping[str, StaticValue]) -> Kernel:
    spec = spec_of(target)
    if spec is None:
        raise RegistryError(f"{target!r} is no kernel; decorate it with @penstock.kernels.kernel(name)")
    if not inspect.isclass(target):
        if options:
            raise RegistryError(f"kernel {spec.name!r} takes no options; got {', '.join(options)}")
        return Kernel(spec, target, source)
    parameters = {} if target.__init__ is object.__init__ else dict(inspect.signature(target).parameters)
    if unknown := sorted(set(options) - set(parameters)):
        known = ", ".join(parameters) or "none"
        raise RegistryError(f"kernel {spec.name!r} has no option {', '.join(unknown)}; it has {known}")
    try:
        given = {key: as_static(value) for key, value in options.items()}
        return Kernel(spec.with_options(given), target(**given), source)
    except Exception as error:
        raise RegistryError(f"kernel {spec.name!r} refuses its options: {type(error).__name__}: {error}") from error
