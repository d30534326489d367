"""Settings: where they come from, who wins, and one clear line when one is wrong."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from penstock.broker.config import NEEDS_RESTART, BrokerConfig
from penstock.broker.settings import SettingsError, load, read


@dataclass(frozen=True)
class Example:
    """One setting of each type."""

    count: int = 1
    ratio: float = 0.5
    name: str = "default"
    is_on: bool = False
    names: tuple[str, ...] = ()
    edges_ms: tuple[float, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    path: Path | None = None
    limit_s: float | None = None
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


def write(folder: Path, text: str) -> Path:
    path = folder / "penstock.toml"
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(Example, "example", env={}) == Example()


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[example]\ncount = 2\nratio = 2\nname = 'file'\n[worker]\ncount = 9\n")
    env = {"PENSTOCK_EXAMPLE_RATIO": "3", "PENSTOCK_EXAMPLE_NAME": "env", "PENSTOCK_WORKER_COUNT": "8"}
    made = load(Example, "example", file=file, env=env, overrides={"name": "line", "ratio": None, "is_on": True})
    assert made == Example(count=2, ratio=3.0, name="line", is_on=True)
    assert isinstance(made.ratio, float)


def test_the_file_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "[example]\ncount = 7\n")
    monkeypatch.chdir(tmp_path)
    assert load(Example, "example", env={}).count == 7
    with pytest.raises(SettingsError, match=r"missing\.toml"):
        load(Example, "example", file=tmp_path / "missing.toml", env={})


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("Yes", True), ("1", True), ("false", False), ("NO", False), ("0", False)],
)
def test_words_for_flags(text: str, value: bool) -> None:
    assert load(Example, "example", env={"PENSTOCK_EXAMPLE_IS_ON": text}).is_on is value


def test_text_becomes_the_declared_type() -> None:
    env = {"PENSTOCK_EXAMPLE_NAMES": "a,b,,c", "PENSTOCK_EXAMPLE_PATH": "/somewhere", "PENSTOCK_EXAMPLE_LIMIT_S": "1.5"}
    made = load(Example, "example", env=env)
    assert (made.names, made.path, made.limit_s) == (("a", "b", "c"), Path("/somewhere"), 1.5)
    env = {"PENSTOCK_EXAMPLE_EDGES_MS": "100, 500.5", "PENSTOCK_EXAMPLE_SIZES": ""}
    made = load(Example, "example", env=env)
    assert (made.edges_ms, made.sizes) == ((100.0, 500.5), ())


def test_lists_and_tables_of_the_file(tmp_path: Path) -> None:
    text = "[example]\nnames = ['a', 'b']\nedges_ms = [1, 2.5]\nsizes = [64, 32]\n[example.options]\nmodel = 'm'\n"
    made = load(Example, "example", file=write(tmp_path, text), env={})
    assert (made.names, made.options) == (("a", "b"), {"model": "m"})
    assert (made.edges_ms, made.sizes) == ((1.0, 2.5), (64, 32))
    assert all(type(edge) is float for edge in made.edges_ms)


def test_several_parts_of_one_reading(tmp_path: Path) -> None:
    content = read(write(tmp_path, "[broker]\ncount = 3\n[scheduling]\ncount = 4\n"))
    assert [load(Example, section, content=content, env={}).count for section in ("broker", "scheduling")] == [3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[example]\nsize = 1\n", "unknown setting example.size in the file; known: count"),
        ("[example]\ncount = 'many'\n", "example.count from the file must be int, not 'many'"),
        ("[example]\ncount = true\n", "example.count from the file must be int, not True"),
        ("[example]\ncount = 1.5\n", "must be int, not 1.5"), ("[example]\nname = 5\n", "must be str, not 5"),
        ("[example]\nis_on = 1\n", "must be bool, not 1"), ("example = 5\n", r"\[example\] must be a table"),
        ("[example]\ncount = -1\n", "example: count must not be negative"), ("count = = 1", "penstock.toml: "),
        ("[example]\nnames = [1]\n", r"example.names from the file must be a list of str, not \[1\]"),
        ("[example]\nedges_ms = [1, 'x']\n", "example.edges_ms from the file must be a list of float"),
        ("[example]\nsizes = [1.5]\n", "must be a list of int"), ("[example]\nsizes = [true]\n", "must be a list of int"),
        ("[example]\nedges_ms = 5\n", "must be a list of float, not 5"),
        ("[brokers]\ncount = 1\n", r"penstock.toml: unknown section \[brokers\]; known: broker, worker, client, "),
        ("count = 1\n", r"unknown section \[count\]"), ("worker = 1\n", r"\[worker\] must be a table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_source(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load(Example, "example", file=write(tmp_path, text), env={})
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_bytes(b"[example]\nname = '\xff'\n")
    with pytest.raises(SettingsError, match=r"penstock\.toml: "):
        load(Example, "example", file=file, env={})


def test_wrong_text_in_the_environment_and_on_the_command_line() -> None:
    with pytest.raises(SettingsError, match=r"example\.is_on from the environment must be bool, not 'perhaps'"):
        load(Example, "example", env={"PENSTOCK_EXAMPLE_IS_ON": "perhaps"})
    with pytest.raises(SettingsError, match=r"unknown setting example\.size in the command line"):
        load(Example, "example", env={}, overrides={"size": 1})
    with pytest.raises(SettingsError, match=r"example\.limit_s from the command line must be float or NoneType, not 'x'"):
        load(Example, "example", env={}, overrides={"limit_s": "x"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_rows": 0}, "window_rows must be above 0"), ({"max_queue_bytes": -1}, "max_queue_bytes must be above 0"),
        ({"max_rows_per_run": 5000}, "max_rows_per_run is at most 4096"), ({"heartbeat_ms": float("nan")}, "heartbeat_ms"),
        ({"liveness_s": 1.0}, "liveness_s must be at least two heartbeats"), ({"drain_s": -1.0}, "drain_s"),
        ({"worker_grace_s": -0.5}, "worker_grace_s"), ({"drain_s": float("nan")}, "drain_s"),
        ({"metrics": "9464"}, "metrics is host:port"), ({"metrics": "127.0.0.1:65536"}, "metrics is host:port"),
        ({"metrics": "0.0.0.0:9464"}, "this machine only: use 127.0.0.1:9464"), ({"metrics": ":9464"}, "metrics is host:port"),
        ({"metrics": "example.com:1"}, "this machine only"), ({"metrics": "::1:80"}, "this machine only"),
    ],
)  # fmt: skip
def test_the_brokers_bounds(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BrokerConfig(**wrong)  # type: ignore[arg-type]


def test_the_brokers_settings_load_and_may_be_zero_where_that_means_something() -> None:
    made = load(BrokerConfig, "broker", env={"PENSTOCK_BROKER_DRAIN_S": "0", "PENSTOCK_BROKER_WORKER_GRACE_S": "0"})
    assert (made.drain_s, made.worker_grace_s) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("metrics", "endpoint"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("localhost:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80))],
)
def test_where_the_metrics_are(metrics: str, endpoint: tuple[str, int]) -> None:
    assert BrokerConfig(metrics=metrics).metrics_endpoint() == endpoint
    assert not BrokerConfig().metrics


def test_no_restart_is_needed_for_what_does_not_exist() -> None:
    assert set(NEEDS_RESTART) < {f.name for f in fields(BrokerConfig)}
