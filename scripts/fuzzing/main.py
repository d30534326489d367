"""`scripts/fuzz`: inputs from a seed for so long; the first that does what none may do is saved, and the exit status is 1."""

import argparse
import hashlib
import importlib
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
from inprocess import Violation

FAILURES = Path(__file__).parents[2] / "fuzz-failures"
TARGETS = {
    "codec": ("inprocess", "CodecTarget"),
    "client": ("inprocess", "ClientTarget"),
    "worker": ("workers", "WorkerTarget"),
    "zmtp": ("brokers", "ZmtpTarget"),
    "broker": ("brokers", "BrokerTarget"),
    "http": ("brokers", "HttpTarget"),
}


def save(target: str, name: str, frames: list[bytes]) -> Path:
    FAILURES.mkdir(exist_ok=True)
    data: bytes = msgpack.packb([name, frames])
    path = FAILURES / f"{target}-{hashlib.blake2b(data, digest_size=6).hexdigest()}"
    path.write_bytes(data)
    return path


def fuzz(target_name: str, seconds: float, seed: int, replay: Path | None) -> int:
    module, cls = TARGETS[target_name]
    target: Any = getattr(importlib.import_module(module), cls)(seed)
    number, began, status = 0, time.monotonic(), 0
    name, frames = "", list[bytes]()
    try:
        while time.monotonic() - began < seconds:
            if replay is not None:
                name, frames = msgpack.unpackb(replay.read_bytes())
            else:
                name, frames = target.make(random.Random(f"{seed}.{number}"))
            target.run(number, name, frames)
            number += 1
            if replay is not None:
                break
    except Violation as e:
        status = 1
        print(f"{target_name}: input {number} of seed {seed}: {e}")
        if replay is None:
            print(f"saved: {save(target_name, name, frames)}")
        if e.__cause__ is not None:
            raise
    finally:
        took_s = time.monotonic() - began
        target.close()
        print(
            "\n".join(
                [f"{target_name}: {number} inputs in {took_s:.0f} s, {number / took_s:.0f}/s, seed {seed}", *target.lines()]
            )
        )
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--target", choices=tuple(TARGETS), default="codec")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="a saved input, once")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what hostile peers make of the log is not of interest here
    return fuzz(args.target, args.seconds, args.seed, args.replay)


if __name__ == "__main__":
    sys.exit(main())
