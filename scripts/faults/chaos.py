"""`scripts/chaos`: real processes under load, a seeded nemesis, and at the end an account of every task.

Knows the order of things and what is printed. Faults are `nemesis.py`'s business, processes `stage.py`'s, clients `load.py`'s,
the account `accounting.py`'s, growth `soak.py`'s.
"""

import argparse
import json
import math
import random
import shutil
import signal
import statistics
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import soak
from accounting import DONE, FAILED, Account, settle
from nemesis import BROKER, KINDS, Done, Nemesis, schedule
from stage import CLIENTS, WORKER_OF, WORKERS, Stage, missing_rights, new_folder

from penstock.broker.protocol import Code
from penstock.client import Client, PenstockError

READY_S, FINISH_S, ASK_S, SAY_S, TURN_S = 90.0, 120.0, 15.0, 5.0, 0.05
POISON_S = 75.0
SPARED_FROM_S = 60.0
SPARED = (BROKER, "s0", "s1", "w0")
"""In a soak these live on after the first minute, so that what they leak can be seen."""
SOAK_KINDS = ("kill", "stop", "partition")
SOAK_RATE = 3.0
GAP_S, SOAK_GAP_S = (2.0, 6.0), (8.0, 16.0)
EXPECTED = {"poison": {Code.DEAD}, "cancel": {Code.CANCELLED}}
"""What tasks may fail with, by what they are for; all others have to be done."""
TEXT = """
What runs: a broker with its journal on disk; two workers on the CPU under their supervisors, one over ipc, one over tcp with
a key; clients that submit durable and other tasks, small and large, cancel some, read slowly, kill themselves and come back;
one that asks for the tasks of others. As root on Linux the tcp worker and a client have networks of their own.

What happens, every few seconds, as the seed says:
  kill       SIGKILL of the broker, a worker, a supervisor or a client
  blackout   SIGKILL of all of them at once, as if the power were cut (what is written stays: the disk goes on)
  stop       SIGSTOP of any of them for 1 to 15 s
  restart    SIGTERM of the broker or a supervisor: it drains, and is started again
  partition  a worker's or a client's network is cut for 2 to 15 s (root)
  disk       the journal's disk is nearly or wholly full for 2 to 6 s (root)
  poison     tasks that end their worker: they must end dead, with evidence

At the end nothing happens any more, and every client waits for all that it has submitted. The account has to show 0 lost,
0 unexpected, 0 with a wrong owner, 0 delivered twice; nothing but poison dead; no process ended by itself. Then the exit status
is 0, else 1, and the folder with all logs stays.

examples:
  scripts/chaos --minutes 10
  scripts/chaos --minutes 2 --seed 7 --faults kill,stop
  scripts/chaos --minutes 20 --soak soak.svg
"""


@dataclass
class Ending:
    """What there is to say at the end."""

    account: Account
    wrong_ends: Counter[str]
    late: list[str]
    num_open: int


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.seed = random.SystemRandom().randrange(1_000_000) if args.seed is None else args.seed
    args.rate = args.rate or (SOAK_RATE if args.soak else 1.0)
    args.gap_s = args.gap_s or (SOAK_GAP_S if args.soak else GAP_S)
    kinds = _kinds(args)
    for kind, why in missing_rights(kinds).items():
        print(f"left out: {kind} ({why})")
        kinds.remove(kind)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = new_folder()
    print(f"seed {args.seed}, faults: {', '.join(kinds) or 'none'}; everything is logged in {folder}", flush=True)
    stage = Stage(folder, kinds, args.seed, POISON_S if "poison" in kinds else 0.0, args.rate)
    is_good = False
    try:
        is_good = _run(args, kinds, stage)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    finally:
        stage.close()
        if is_good and not args.keep:
            shutil.rmtree(folder)
        else:
            print(f"the logs are in {folder}; the same again: scripts/chaos {_again(args, kinds)}")
    return 0 if is_good else 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="scripts/chaos", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=TEXT,
        description="Run Penstock under load, kill, stop, cut off and restart what runs, and account for every task.",
    )  # fmt: skip
    p.add_argument("--minutes", type=float, default=1.0, help="how long faults go on (default 1), beside start and end")
    p.add_argument("--seed", type=int, help="of the schedule and the loads (default: drawn, and printed)")
    p.add_argument("--faults", metavar="KIND,...", help=f"which, of {','.join(KINDS)} (default: all that can be done here)")
    p.add_argument("--no-faults", action="store_true", help="the same load without faults, to compare with")
    p.add_argument(
        "--soak", type=Path, metavar="FILE",
        help="spare broker, supervisors and one worker after a minute, judge their growth, and plot it: .svg, .png or .pdf",
    )  # fmt: skip
    p.add_argument("--gap-s", type=float, nargs=2, metavar=("MIN", "MAX"), help="between two faults (default 2 6; soak 8 16)")
    p.add_argument("--rate", type=float, help="how many times as much as usual the clients submit (default 1; soak 3)")
    p.add_argument("--keep", action="store_true", help="keep the folder with the logs in any case")
    return p


def _kinds(args: argparse.Namespace) -> list[str]:
    given = args.faults.split(",") if args.faults else SOAK_KINDS if args.soak else KINDS
    if unknown := set(given) - set(KINDS):
        raise SystemExit(f"scripts/chaos: no such fault: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return [] if args.no_faults else [kind for kind in KINDS if kind in given]


def _again(args: argparse.Namespace, kinds: Sequence[str]) -> str:
    given = f"--minutes {args.minutes:g} --seed {args.seed} --gap-s {args.gap_s[0]:g} {args.gap_s[1]:g} --rate {args.rate:g} "
    return given + (f"--faults {','.join(kinds)}" if kinds else "--no-faults") + (f" --soak {args.soak}" if args.soak else "")


def _run(args: argparse.Namespace, kinds: Sequence[str], stage: Stage) -> bool:
    seconds = 60.0 * args.minutes
    stage.open()
    with Client(stage.url, name="chaos", connect_timeout=READY_S) as ps, ExitStack() as inner:
        _wait_ready(ps, stage)
        faults = schedule(
            args.seed, seconds, kinds, stage.roles, stage.cut_off,
            tuple(args.gap_s), (SPARED, SPARED_FROM_S) if args.soak else ((), 0.0),
        )  # fmt: skip
        sampler = inner.enter_context(_sampler(stage)) if args.soak else None
        nemesis = Nemesis(faults, stage, time.monotonic())
        _faults(nemesis, stage, seconds)
        print("no more faults; the clients wait for what is open", flush=True)
        late = stage.finish(FINISH_S, print)
        inner.close()
        ending = _ending(ps, stage, late)
    is_good = _tell(ending, nemesis, stage)
    if sampler is not None:
        is_good &= _tell_soak(args, sampler, nemesis, stage)
    return is_good


def _wait_ready(ps: Client, stage: Stage) -> None:
    until = time.monotonic() + READY_S
    while True:
        stage.tend(time.monotonic())
        ready = {w["name"] for w in ps.status(timeout=READY_S)["workers"] if w["state"] in ("ready", "busy")}
        if ready.issuperset(WORKERS):
            return
        if time.monotonic() > until or stage.surprises:
            raise SystemExit(f"scripts/chaos: not ready: {stage.surprises or ready}")
        time.sleep(0.2)


def _sampler(stage: Stage) -> soak.Sampler:
    names = (BROKER, "s0", "s1", *WORKERS)
    return soak.Sampler(lambda: {name: stage.pid(name) for name in names}, stage.url, stage.state / "penstock" / "brokers")


def _faults(nemesis: Nemesis, stage: Stage, seconds: float) -> None:
    """The time of trouble, with a line every few seconds."""
    start = time.monotonic()
    tails = [Tail(stage.folder / f"{name}.times") for name, _ in CLIENTS]
    say_at, num_before = start + SAY_S, 0
    while (now := time.monotonic()) < start + seconds:
        for fault in nemesis.turn(now):
            print(f"  {now - start:6.1f} s  {fault}", flush=True)
        stage.tend(now)
        if now >= say_at:
            num = sum(tail.num_lines() for tail in tails)
            rate = (num - num_before) / (now - say_at + SAY_S)
            print(f"{start + seconds - now:6.0f} s left, {rate:5.0f} tasks/s, {len(nemesis.done)} faults", flush=True)
            say_at, num_before = now + SAY_S, num
        time.sleep(TURN_S)
    nemesis.heal(time.monotonic())


@dataclass
class Tail:
    """How many lines a growing file has."""

    path: Path
    _at: int = 0
    _num: int = 0

    def num_lines(self) -> int:
        if self.path.exists():
            with self.path.open("rb") as f:
                f.seek(self._at)
                new = f.read()
            self._at, self._num = self._at + len(new), self._num + new.count(b"\n")
        return self._num


# --- the end ---------------------------------------------------------------------------------------------------------


def _ending(ps: Client, stage: Stage, late: list[str]) -> Ending:
    held, num_open = set[str](), -1
    try:
        num_open = ps.status(timeout=ASK_S)["tasks"]["open"]
        held = {job["key"].partition("/")[2] for job in ps.jobs(timeout=ASK_S) if job["key"]}
    except (PenstockError, TimeoutError) as e:
        print(f"the broker does not answer at the end: {e}")
    stage.close()
    logs = [stage.folder / f"{name}.log" for name, _ in CLIENTS]
    return Ending(settle(logs, held), Counter(_wrong_ends(logs)), late, num_open)


def _wrong_ends(logs: Iterable[Path]) -> Iterator[str]:
    """Of tasks that were to be done and failed, or were to be dead and were done: what they are for, and how they ended."""
    for path in logs:
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off with its client
                continue
            purpose = entry.get("key", "").split("-")[0]
            if entry["is"] == FAILED and entry["code"] not in EXPECTED.get(purpose, ()):
                yield f"{purpose}: {entry['code']}"
            elif entry["is"] == DONE and purpose == "poison":
                yield "poison: done"


def _tell(ending: Ending, nemesis: Nemesis, stage: Stage) -> bool:
    """Print the account; whether all is as it must be."""
    account = ending.account
    print()
    rows = [
        ("submitted", account.num_submitted), ("accepted", account.num_accepted), ("done", account.num_done),
        ("dead (poison)", account.failed[Code.DEAD]), ("cancelled", account.failed[Code.CANCELLED]),
        ("refused", len(account.refused)), ("indeterminate", len(account.indeterminate)),
        ("lives of clients", account.num_lives),
        ("lost", len(account.lost)), ("unexpected", len(account.unexpected)), ("wrong owner", len(account.wrong_owner)),
        ("duplicates", len(account.duplicates)),
    ]  # fmt: skip
    for name, number in rows:
        print(f"{name:20s} {number:8d}")
    print(f"\n{'faults':26s} {'times':>6s} {'tasks end again after: median':>30s} {'max':>8s}")
    for name, waits in sorted(recoveries(nemesis.done, stage.roles, stage.folder).items()):
        found = [wait for wait in waits if wait is not None]
        times = f"{statistics.median(found):28.1f} s {max(found):6.1f} s" if found else f"{'not seen':>30s}"
        print(f"{name:26s} {len(waits):6d} {times}")
    wrong = [f"open at the end: {ending.num_open}"] if ending.num_open else []
    wrong += [f"{name} did not end" for name in ending.late]
    wrong += [f"ended otherwise: {what} ({number} times)" for what, number in ending.wrong_ends.items()]
    wrong += [f"{s.name} ended by itself with {s.status}:\n{s.last_words}" for s in stage.surprises]
    for line in ("", *(account.text().splitlines()[2:]), *wrong):
        print(line)
    return account.is_clean and not wrong


def recoveries(done: Sequence[Done], roles: Mapping[str, str], folder: Path) -> dict[str, list[float | None]]:
    """How long tasks did not end, per kind of fault and role of its target.

    Seconds from a fault's end until a task ended that was submitted after its beginning and that is the client's who was hit,
    made by the worker that was hit, or any where it was the broker; None if the same one, or the broker, was hit before that.
    """
    by_party = _ends(folder)
    made = defaultdict[str, list[float | None]](list)
    for i, one in enumerate(done):
        target = one.fault.target
        ends = by_party[WORKER_OF.get(target, target)]
        found = next((end for end, begun in ends[bisect_left(ends, (one.ended, 0.0)) :] if begun >= one.began), None)
        next_hit = next((other.began for other in done[i + 1 :] if other.fault.target in (target, BROKER)), math.inf)
        made[f"{one.fault.kind} {roles[target]}"].append(None if found is None or found > next_hit else found - one.ended)
    return made


def _ends(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(end, begin) of all tasks by time: of each client, of each worker, and under the broker's name all of them."""
    made = defaultdict[str, list[tuple[float, float]]](list)
    for path in folder.glob("*.times"):
        for end, begun, worker in _times(path):
            for party in (path.stem, worker.split("-")[0], BROKER):  # the broker may call it w0-2
                made[party].append((end, begun))
    for ends in made.values():
        ends.sort()
    return made


def _times(path: Path) -> Iterator[tuple[float, float, str]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            end, begun, worker = line.split()
            yield float(end), float(begun), worker


def _tell_soak(args: argparse.Namespace, sampler: soak.Sampler, nemesis: Nemesis, stage: Stage) -> bool:
    """Print what has grown, and plot; whether all of it is flat."""
    seconds = 60.0 * args.minutes
    times = _times(stage.folder / "probe.times")
    calls = [(end, 1e3 * (end - begun)) for end, begun, _ in times if end < sampler.started_at + seconds]
    series, from_s = sampler.finished(calls), soak.warm_up(seconds)
    judged = [soak.judge(s, from_s) for s in series if not s.name.endswith(" w1")]  # it is hit again and again
    verdicts = [verdict for verdict in judged if verdict is not None]
    print(f"\ngrowth after {from_s:.0f} s; allowed: {soak.SHARE:.0%} of the median and a floor")
    print("\n".join(soak.table(verdicts)))
    title = f"scripts/chaos --minutes {args.minutes:g} --seed {args.seed} --soak: {len(nemesis.done)} faults"
    soak.plot(args.soak, series, [one.began - sampler.started_at for one in nemesis.done], from_s, title)
    print(f"plotted: {args.soak}")
    if not verdicts:
        print("too short to be judged")
    return all(verdict.is_flat for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
