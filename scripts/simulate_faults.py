"""Run seeds of the simulation in tests/simulation: the real broker, workers and clients under simulated faults."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from simulation.faults import FAULTS, KINDS
from simulation.planted import BUGS, plant
from simulation.runner import Total, minimise, results
from simulation.world import CHAOS_S, Result, World

MAX_SHOWN = 3
HELP = """
Each seed draws parties, work and faults, runs some seconds of virtual time, then lets everything heal and waits until all
that is open has ended. Promises are checked all the way (docs/simulation.md). The same seed does the same, on any machine.

  scripts/simulate-faults --seeds 2000                 as for every commit
  scripts/simulate-faults --seeds 100000               before a release
  scripts/simulate-faults --seed 4711 --trace          one seed, with all that happens
  scripts/simulate-faults --planted all                do the planted bugs show?
  scripts/simulate-faults --kinds                      what may go wrong

The hash that is printed at the end covers every message and decision of all seeds; it depends on nothing but the code and the
seeds. Exit status 1: a promise was broken; seed, story and the smallest form that breaks it too are printed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        "simulate-faults", description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="S", help="the first one (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, metavar="K", help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print all that happens")
    parser.add_argument("--without", default="", metavar="KIND,...", help="with --seed: leave these faults out")
    parser.add_argument("--chaos-s", type=float, default=CHAOS_S, metavar="T", help="with --seed: faults so long (%(default)s)")
    parser.add_argument("--planted", metavar="NAME", help="with this bug planted in the product; 'all': each of them in turn")
    parser.add_argument("--kinds", action="store_true", help="print what may go wrong, and the bugs that can be planted")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.planted not in (None, "all", *BUGS):
        parser.error(f"no bug is called {arguments.planted!r}; there are: {', '.join(BUGS)}")
    if unknown := set(filter(None, arguments.without.split(","))) - set(KINDS):
        parser.error(f"no kind is called {min(unknown)!r}; there are: {', '.join(KINDS)}")
    if arguments.kinds:
        return _print_kinds()
    if arguments.planted == "all":
        return _show_all_planted(arguments.start, arguments.seeds, arguments.jobs)
    if arguments.seed is not None:
        return _run_one(arguments)
    return _run_many(arguments.start, arguments.seeds, arguments.jobs, arguments.planted or "")


def _print_kinds() -> int:
    for name, fault in FAULTS.items():
        print(f"{name:<16} {fault.__doc__}")
    print("\nof the users' work:", ", ".join(kind for kind in KINDS if kind not in FAULTS))
    print("\nplanted bugs:")
    for bug in BUGS.values():
        print(f"{bug.name:<34} {bug.part:<8} {bug.text}")
    return 0


def _run_one(arguments: argparse.Namespace) -> int:
    if arguments.planted:
        plant(arguments.planted)
    world = World(arguments.seed, list(filter(None, arguments.without.split(","))), arguments.chaos_s)
    if arguments.trace:
        world.timeline.on_note = print
    result = world.run()
    print(f"seed {result.seed}: {result.num_events} events, faults: {', '.join(result.kinds) or 'none'}, hash {result.digest}")
    if result.invariant:
        print("\n".join(() if arguments.trace else result.story))
        print(f"BROKEN  {result.text}")
    return int(bool(result.invariant))


def _run_many(start: int, num_seeds: int, jobs: int, bug: str) -> int:
    total, began = Total(), time.monotonic()
    for result in results(start, num_seeds, jobs, bug):
        total.add(result)
        if total.num_seeds % 50 == 0:
            _show_progress(total, num_seeds, time.monotonic() - began)
        if len(total.failures) >= MAX_SHOWN:
            break
    took_s = time.monotonic() - began
    _show_progress(total, num_seeds, took_s, is_last=True)
    if bug:
        plant(bug)
    for result in total.failures:
        _explain(result, bug)
    rate = f"{total.num_seeds} seeds in {took_s:.1f} s, {total.num_seeds / took_s:.0f} seeds/s, {total.num_events} events"
    last = start + total.num_seeds - 1
    print(f"seeds {start} to {last}: {len(total.failures)} failures; {rate}; hash {total.digest}")
    return int(bool(total.failures))


def _show_progress(total: Total, num_seeds: int, took_s: float, is_last: bool = False) -> None:
    if sys.stderr.isatty() or is_last:
        done = total.num_seeds / num_seeds
        bar = "#" * round(30 * done)
        left_s = took_s / done - took_s if done else 0.0
        rate = total.num_seeds / max(took_s, 1e-9)
        text = f"\r[{bar:<30}] {total.num_seeds}/{num_seeds}, {rate:.0f} seeds/s, {left_s:.0f} s left "
        print(text, end="\n" if is_last else "", file=sys.stderr, flush=True)


def _explain(result: Result, bug: str) -> None:
    without, chaos_s, smallest = minimise(result)
    planted = f" --planted {bug}" if bug else ""
    left_out = f" --without {','.join(without)}" if without else ""
    print(f"\nseed {result.seed} BROKEN  {result.text}")
    print("\n".join(f"    {line}" for line in result.story))
    print(f"  again:    scripts/simulate-faults --seed {result.seed} --trace{planted}")
    print(f"  smallest: scripts/simulate-faults --seed {result.seed} --trace{planted}{left_out} --chaos-s {chaos_s}")
    print(f"            faults {', '.join(smallest.kinds) or 'none'}; {smallest.num_events} events; {smallest.text}\n")


def _show_all_planted(start: int, num_seeds: int, jobs: int) -> int:
    num_missed = 0
    print(f"{'planted bug':<34} {'part':<8} {'seeds':>6}  invariant")
    for bug in BUGS.values():
        found = next((r for r in results(start, min(num_seeds, 1000), jobs, bug.name) if r.invariant), None)
        num_missed += found is None
        seeds, what = ("-", "NOT CAUGHT") if found is None else (str(found.seed - start + 1), found.text[:90])
        print(f"{bug.name:<34} {bug.part:<8} {seeds:>6}  {what}", flush=True)
    return int(num_missed > 0)


if __name__ == "__main__":
    sys.exit(main())
