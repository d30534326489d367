"""The demo: what `scripts/demo` runs. It uses nothing but the command line `penstock` and the SDK, as any program would."""

import ast
import collections
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from penstock.client import Client, Task, Unavailable, as_completed

NUM_TEXTS = 1500
MAX_CHARACTERS = 160
# Not the library that people search in: tests, programs, packages with a world of their own, the interpreter's inside.
SKIPPED = {
    "asyncio", "bdb", "ctypes", "dist-packages", "distutils", "doctest", "encodings", "ensurepip", "idlelib", "imaplib",
    "importlib", "lib2to3", "logging", "mailbox", "msilib", "multiprocessing", "nntplib", "pdb", "pydoc", "pydoc_data",
    "pyclbr", "site-packages", "symtable", "test", "tests", "tkinter", "turtle", "turtledemo", "unittest", "wsgiref", "xml",
    "xmlrpc",
}  # fmt: skip
QUESTIONS = [
    "compress a file with gzip",
    "parse command line arguments",
    "wait for several threads to finish",
    "pick a random element from a list",
    "make a temporary directory",
]
PENSTOCK = [sys.executable, "-P", "-m", "penstock.client.cli"]
READY_TIMEOUT_S = 60.0
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main() -> int:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder:
        # A runtime and a state folder of its own: the demo neither sees nor disturbs a broker that is running already.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        environment |= {"XDG_RUNTIME_DIR": folder, "XDG_STATE_HOME": folder}
        say("[bold]Penstock[/]: one queue for all GPU work of a machine. This one works on its CPU if there is no GPU.\n")
        say("1. Starting a broker and its workers:  penstock up")
        with running(environment, Path(folder)) as up:
            items = read_library()
            with Client(f"ipc://{folder}/penstock", name="demo", timeout=120.0, connect_timeout=READY_TIMEOUT_S) as ps:
                wait_ready(ps, up)
                texts = [item for item in items if item.text]
                chosen = spread(texts, NUM_TEXTS)
                index(ps, chosen, len({item.module for item in chosen}))
                search(ps, chosen)
                column_job(ps, items)
            say("\n5. What the broker says about it:  penstock status")
            subprocess.run([*PENSTOCK, "status"], env=environment, check=True)
            processes = [up, *up.children(recursive=True)]
        left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    if left:
        say(f"\n[red]Still running:[/] {', '.join(map(str, left))}")
        return 1
    say(f"\n6. Stopped. Of {len(processes)} processes none is left. Everything took {time.perf_counter() - began:.1f} s.")
    say("\nYour turn:\n  .venv/bin/penstock up\n  .venv/bin/penstock call softmax x=[1,2,3]")
    return 0


def say(text: str) -> None:
    console.print(text)


# --- starting and stopping -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(environment: dict[str, str], folder: Path) -> Iterator[psutil.Process]:
    """`penstock up` for as long as the block runs; its log is shown if it fails."""
    log = folder / "up.log"
    with log.open("w") as file:
        process = subprocess.Popen([*PENSTOCK, "up"], env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status:
            say(f"[red]penstock up ended with status {status}:[/]\n{log.read_text()}")


def wait_ready(ps: Client, up: psutil.Process) -> None:
    """Until a worker is ready; raises Unavailable if none comes."""
    until = time.monotonic() + READY_TIMEOUT_S
    while True:
        status = ps.status()
        ready = [worker for worker in status["workers"] if worker["state"] in ("ready", "busy")]
        if ready:
            names = ", ".join(f"{worker['name']} on {worker['device']}" for worker in ready)
            say(f"   Ready: the broker is process {status['pid']}; {names}.\n")
            return
        if time.monotonic() > until or not up.is_running():
            raise Unavailable("no worker became ready")
        time.sleep(0.05)


# --- real input: Python's standard library -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A function or class of the standard library; `text` is its first paragraph, or empty if it is too short to help."""

    module: str
    name: str
    text: str
    num_lines: int
    num_characters: int


def read_library() -> list[Item]:
    """Every public function and class, read from the sources: nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    items: list[Item] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and not any(part.startswith("_") and part != "__init__" for part in parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            items += collect(tree, ".".join(part for part in parts if part != "__init__"), "")
    return items


def collect(node: ast.AST, module: str, prefix: str) -> Iterator[Item]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        doc = ast.get_docstring(child) or ""
        paragraph = " ".join(doc.split("\n\n")[0].split())[:MAX_CHARACTERS]
        text = paragraph if len(paragraph) >= 25 and len(paragraph.split()) >= 4 else ""
        num_lines = (child.end_lineno or child.lineno) - child.lineno + 1
        yield Item(module, f"{prefix}{child.name}", text, num_lines, len(doc))
        if isinstance(child, ast.ClassDef):
            yield from collect(child, module, f"{prefix}{child.name}.")


def spread(items: Sequence[Item], wanted: int) -> list[Item]:
    """So many of them, from as many modules as possible: the first of each module, then the second of each, ..."""
    by_module: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        by_module[item.module].append(item)
    ranked = sorted((rank, i, item) for i, group in enumerate(by_module.values()) for rank, item in enumerate(group))
    return [item for _, _, item in ranked[:wanted]]


# --- the work ------------------------------------------------------------------------------------------------------


def index(ps: Client, items: Sequence[Item], num_modules: int) -> None:
    say(f"2. Reading Python's own documentation: {len(items):,} first paragraphs from {num_modules} modules.")
    say("   A sentence-transformer turns each into 384 numbers. Every text is one task; the broker makes batches.")
    began = time.perf_counter()
    tasks = [ps.submit("embed", text=f"{item.module} {item.name}: {item.text}") for item in items]
    bar = track(as_completed(tasks), "   embedding", total=len(tasks), console=console, transient=True)
    collections.deque(bar, maxlen=0)
    took_s = time.perf_counter() - began
    vectors = np.stack([task.result() for task in tasks])
    stored = ps.call("corpus", name="python-docs", vectors=vectors)
    say(f"   Done in {took_s:.1f} s, {len(tasks) / took_s:,.0f} texts a second.\n   {describe_batches(tasks)}")
    say(f"   Stored as the corpus python-docs, version {stored['version']}: {stored['n']:,} vectors.\n")


def describe_batches(tasks: Sequence[Task]) -> str:
    """What the timings of the tasks tell."""
    timings = [task.timings for task in tasks]
    sizes = collections.Counter(t["batch_size"] for t in timings)
    batches = ", ".join(f"{num // size} of {size}" for size, num in sizes.most_common(3))
    waited, computed = (float(np.median([t[name] for t in timings])) for name in ("queue_ms", "compute_ms"))
    return f"Batches: {batches}. A text waited {waited:,.0f} ms, then its batch ran {computed:,.0f} ms (medians)."


def search(ps: Client, items: Sequence[Item]) -> None:
    say("3. Asking in plain words:")
    queries = ps.map_rows("embed", text=QUESTIONS)
    tasks = [ps.submit("search", query=query, corpus="python-docs", k=3) for query in queries]
    for question, task in zip(QUESTIONS, tasks, strict=True):
        say(f"\n   [bold]{question}[/]")
        found = task.result()
        for row, score in zip(found["index"], found["score"], strict=True):
            item = items[row]
            line = f"   {score:.2f}  {item.module}.{item.name}"
            console.print(f"{line:<52} {item.text}", markup=False, overflow="ellipsis", no_wrap=True)
    timings = tasks[-1].timings
    say(f"\n   The last search: {timings['compute_ms']:.1f} ms of work in a batch of {timings['batch_size']}.\n")


def column_job(ps: Client, items: Sequence[Item]) -> None:
    names = sorted({item.module.split(".")[0] for item in items})
    number = {name: i for i, name in enumerate(names)}
    rows = [(number[item.module.split(".")[0]], item.num_lines, item.num_characters) for item in items]
    table, columns = np.array(rows, np.float64), ["module", "lines", "doc"]
    say(f"4. A column job: which modules of Python explain themselves best? A table of {len(table):,} functions and classes.")
    measures = ["count()", "mean(doc > 0)", "mean(doc)", "max(lines)"]
    task = ps.submit("aggregate", table=table, columns=columns, measures=measures, by="module")
    long = ps.call("filter", table=table, columns=columns, where="lines > 150 and doc == 0")
    result = task.result()
    shown = Table("module", "functions, classes", "documented", "characters each", "longest, lines", box=None, pad_edge=False)
    groups = [g for g in range(len(result["group"])) if result["out"][g, 0] >= 40]
    for g in sorted(groups, key=lambda g: (-result["out"][g, 1], -result["out"][g, 2]))[:5]:
        count, share, characters, longest = result["out"][g]
        name = names[int(result["group"][g])]
        shown.add_row(name, f"{count:.0f}", f"{share:.0%}", f"{characters:.0f}", f"{longest:.0f}")
    console.print(shown)
    undocumented = ", ".join(f"{items[i].module}.{items[i].name}" for i in long["index"][:3])
    say(f"   Over 150 lines and not a word of documentation: {len(long['index'])} of them, such as {undocumented}.")
    say(f"   {task.timings['compute_ms']:.1f} ms of work for the table above.")


if __name__ == "__main__":
    sys.exit(main())
