"""Which kernels are found, and every way in which asking for them can be wrong."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

from penstock.kernels import Kernel, RegistryError, SpecError, registry

SCALE = """
import torch
from penstock.kernels import kernel
from penstock.kernels.softmax import softmax  # an import of a built-in one is no second kernel

@kernel("scale")
def scale(x, factor=2.0):
    return x * factor

@kernel("shift")
class Shift:
    def __init__(self, by: float = 1.0, *, label: str | None = None):
        if by == 0:
            raise ValueError("by must not be 0")
        self.by = by
    def __call__(self, x):
        return x + self.by
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load(*names: str, **arguments: object) -> dict[str, Kernel]:
    return registry.load(names, **{"entry_points": False, **arguments})  # type: ignore[arg-type]


def test_all_built_in_kernels_load_without_their_state() -> None:
    kernels = load()
    assert tuple(kernels) == registry.builtin()
    assert set(kernels) == {
        *("aggregate", "corpus", "embed", "filter", "matmul"),
        *("search", "sha256", "sleep", "softmax", "transform"),
        *("attention", "attention_varlen", "paged_decode"),
        *("linear", "moe", "quantized_linear"),
        *("sample", "speculative_verify", "token_transform"),
        *("selective_scan", "ssd"),
        "simulate",
    }
    resident = [
        "embed",
        "linear",
        "moe",
        "quantized_linear",
        "token_transform",
    ]
    assert [name for name, item in kernels.items() if not item.is_loaded] == resident
    assert all(item.spec.name == name and item.spec.doc for name, item in kernels.items())


def test_every_built_in_kernel_has_a_reference_beside_it() -> None:
    import penstock.kernels

    root = Path(penstock.kernels.registry.__file__).parent
    folders = {target.split(":")[0].split(".")[2] for target in registry._BUILTIN.values()}
    assert all((root / folder / "reference.py").is_file() for folder in folders)


def test_loading_the_built_in_kernels_leaves_the_compilers_out() -> None:
    """torch's compiler takes a second to import, and every worker would wait for it."""
    code = (
        "import sys; from penstock.kernels import ops, registry; registry.load(); [getattr(ops, n) for n in ops.__all__];"
        "names = [n for n in sys.modules if n.split('.')[0] == 'triton' or n == 'torch._dynamo'];"
        "assert not names, names"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_built_in_kernels_are_imported_on_first_use() -> None:
    code = (
        "import sys; import penstock.kernels, penstock.kernels.ops as ops; penstock.kernels.registry.builtin();"
        "names = [n for n in sys.modules if n.startswith(('tokenizers', 'safetensors', 'transformers'))];"
        "assert not names, names; assert 'penstock.kernels.softmax' not in sys.modules;"
        "ops.softmax; assert 'penstock.kernels.softmax' in sys.modules and 'penstock.kernels.embed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_functions_can_be_called_directly() -> None:
    from penstock.kernels import ops

    assert ops.softmax(torch.zeros(1, 2)).tolist() == [[0.5, 0.5]]
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        ops.nothing  # noqa: B018


def test_a_users_module_is_found_by_name_and_by_path(modules: Path) -> None:
    (modules / "my_kernels.py").write_text(SCALE)
    kernels = load("my_kernels", options={"shift": {"by": 3.0}})
    assert kernels["scale"].run(x=torch.ones(1, 2))["out"].tolist() == [[2.0, 2.0]]
    assert kernels["shift"].run(x=torch.ones(1, 2))["out"].tolist() == [[4.0, 4.0]]
    assert kernels["scale"].source == "module my_kernels"
    (modules / "by_path.py").write_text(SCALE)
    assert "scale" in load(str(modules / "by_path.py"))


def test_every_load_gives_new_kernels() -> None:
    assert load()["embed"] is not load()["embed"]


def test_only_some_are_offered(modules: Path) -> None:
    (modules / "some_kernels.py").write_text(SCALE)
    assert set(load("some_kernels", only=["scale", "softmax"])) == {"scale", "softmax"}
    with pytest.raises(RegistryError, match=r"no kernel 'scael'; there are .*scale"):
        load("some_kernels", only=["scael"])


def test_options_reach_the_constructor_and_the_digest(modules: Path) -> None:
    (modules / "option_kernels.py").write_text(SCALE)
    one, two = (load("option_kernels", options={"shift": {"by": by}})["shift"].spec for by in (1.0, 2.0))
    assert one.to_wire()["digest"] != two.to_wire()["digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": {"buy": 1}}, "no option buy; it has by, label"),
        ({"scale": {"by": 1}}, "takes no options"),
        ({"softmax": {"by": 1}}, "takes no options"),
        ({"sleep": {"by": 1}}, "no option by; it has none"),
        ({"search": {"cache_bytes": "much"}}, "refuses its options: ValueError"),
        ({"shift": {"by": 0}}, "by must not be 0"),
        ({"shift": {"by": object()}}, "refuses its options"),
        ({"nothing": {}}, "'nothing', which is no kernel"),
    ],
)
def test_wrong_options_are_refused(modules: Path, options: dict[str, dict[str, object]], message: str) -> None:
    (modules / "refused_kernels.py").write_text(SCALE)
    with pytest.raises(RegistryError, match=message):
        load("refused_kernels", options=options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no kernels; decorate"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'$"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("from penstock.kernels import kernel\n@kernel('k')\ndef k(*x): ...", "kernel 'k'.*name every parameter"),
        ("from penstock.kernels import kernel\n@kernel('softmax')\ndef k(x): ...", "two kernels are called 'softmax'"),
        (SCALE + "@kernel('scale')\ndef other(x): ...", "two kernels are called 'scale'"),
    ],
)
def test_wrong_modules_are_refused(modules: Path, text: str, message: str) -> None:
    (modules / "wrong_kernels.py").write_text(text)
    with pytest.raises(RegistryError, match=message) as caught:
        load("wrong_kernels")
    assert "\n" not in str(caught.value)


def test_modules_that_are_not_there(modules: Path) -> None:
    with pytest.raises(RegistryError, match=r"'absent' cannot be imported: .*PYTHONPATH"):
        load("absent")
    with pytest.raises(RegistryError, match="no file"):
        load(str(modules / "absent.py"))
    (modules / "json.py").write_text(SCALE)
    with pytest.raises(RegistryError, match="rename the file"):
        load(str(modules / "json.py"))


def fake_entry_points(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    points = EntryPoints(EntryPoint(name, value, registry.GROUP) for name, value in values.items())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.select(group=group))


def test_entry_points_name_modules_or_kernels(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "entry_kernels.py").write_text(SCALE)
    fake_entry_points(monkeypatch, whole="entry_kernels", part="entry_kernels:scale")
    kernels = registry.load(["entry_kernels"])  # reached three ways, still one kernel
    assert {"scale", "shift"} <= set(kernels)
    assert kernels["scale"].source == "entry point 'part'"
    assert "scale" not in load()


@pytest.mark.parametrize("value", ["entry_kernels:nothing", "absent", "entry_kernels:torch", "entry_kernels:SCALE", "os"])
def test_wrong_entry_points_are_refused(modules: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (modules / "entry_kernels.py").write_text(SCALE + "\nSCALE = 1")
    if value == "entry_kernels:torch":  # a module, with no kernels in it
        value = "entry_kernels:torch.nn"
    fake_entry_points(monkeypatch, broken=value)
    with pytest.raises(RegistryError, match="entry point 'broken'"):
        registry.load()


def test_the_real_entry_points_are_read() -> None:
    assert set(registry.builtin()) <= set(registry.load())


def test_single_kernels() -> None:
    assert registry.get("search", cache_bytes=10).spec.options == {"cache_bytes": 10}
    with pytest.raises(RegistryError, match="no built-in kernel 'serach'"):
        registry.get("serach")
    with pytest.raises(SpecError, match="is no kernel; decorate"):
        registry.create(len)
