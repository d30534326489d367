"""Nothing of ours runs data as code: no pickle, no eval, no shell, no loader that unpickles."""

import ast
from collections.abc import Iterator

import pytest
from source_tree import PACKAGES, ROOT, package_files, script_files

PICKLING_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "multiprocessing", "shelve",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Dotted names by their ends: `x.y.torch.load` is caught like `torch.load`.
CALLS = {
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
}
METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized", "read_pickle", "to_pickle"}
# Keys that others can read, and a loop of handshakes that one of them can end: `keys.py` and `gate.py` do it.
INSECURE = ("zmq.auth",)
# Keyword arguments that must be absent, or False in the source.
SWITCHES = {"shell", "allow_pickle", "trust_remote_code"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a syntax tree that may run data as code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Attribute():
                names = [ast.unparse(node)]
            case ast.Name(id=name) if name in BUILTINS:
                yield node.lineno, name
                continue
            case ast.keyword(arg=str(name), value=value) if name in SWITCHES:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield value.lineno, f"{name}="
                continue
            case _:
                continue
        yield from ((node.lineno, name) for name in names if is_forbidden(name, isinstance(node, ast.Attribute)))


def is_forbidden(name: str, is_attribute: bool) -> bool:
    if not is_attribute and name.split(".")[0] in PICKLING_MODULES:
        return True
    if any(f"{name}.".startswith(f"{module}.") for module in INSECURE):
        return True
    if name.startswith("safetensors."):  # safetensors.torch.load reads no code
        return False
    return name.split(".")[-1] in METHODS or any(name == call or name.endswith(f".{call}") for call in CALLS)


@pytest.mark.parametrize("folder", [*PACKAGES, "scripts"])
def test_no_data_is_run_as_code(folder: str) -> None:
    files = script_files() if folder == "scripts" else package_files(folder)
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for line, name in unsafe(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    ]
    assert found == []


def test_shell_scripts_do_not_eval() -> None:
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path not in script_files()]
    assert scripts
    words = {path.name: path.read_text(encoding="utf-8").split() for path in scripts}
    assert [name for name, text in words.items() if "eval" in text] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as codec",
        "eval(text)",
        "run = exec",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "yaml.load(text)",
        "socket.recv_pyobj()",
        "from multiprocessing.connection import Client",
        "pd.read_pickle(path)",
        "import zmq.auth.thread",
        "from zmq.auth import create_certificates",
        "zmq.auth.create_certificates(folder, name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_finds_what_it_must(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(pattern)",
        "np.load(path, allow_pickle=False)",
        "safetensors.torch.load_file(path)",
        "from safetensors.torch import load",
        "yaml.safe_load(text)",
        "subprocess.run([program], shell=False)",
    ],
)
def test_the_check_lets_the_harmless_pass(source: str) -> None:
    assert not list(unsafe(ast.parse(source)))
