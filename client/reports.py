"""What is told of tasks that have not ended: this client's own word while they wait here, the broker's afterwards.

Knows the bodies of replies to `status`, of which an older broker sends less; does not know how they are asked for.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

from penstock.client.connection import READY
from penstock.client.errors import InvalidInput, ProtocolFault
from penstock.client.run import Run
from penstock.client.session import Session

_ENDED: Final = ("finished", "done", "failed", "cancelled")
"""The broker says the first; `state` of a handle is one of the others."""


def of_waiting(session: Session, run: Run, now: float) -> dict[str, Any]:
    """The report of a run that is still in the client."""
    return {
        "id": run.id.hex(), "state": "waiting", "kernel": run.shape.kernel, "rows": run.num_rows,
        "done": run.num_rows - run.num_open, "priority": run.options.priority, "eta_ms": None,
        "deadline_in_ms": None if run.deadline == math.inf else 1000.0 * (run.deadline - now),
        "why": _why_waiting(session, run, now),
    }  # fmt: skip


def _why_waiting(session: Session, run: Run, now: float) -> str:
    rest = run.rest
    if session.connection.state != READY:
        why = "the broker does not answer at present"
    elif rest is not None and rest.until > now:
        times = "once" if rest.num_refused == 1 else f"{rest.num_refused} times"
        why = f"the broker had no room, {times} ({rest.error.message}); again in {rest.until - now:.1f} s"
    else:
        num_at_once = session.submissions.credit.window_rows
        why = f"{session.backlog.num_ahead(run)} rows go before it, and the broker takes {num_at_once} at a time"
    return f"it waits in this client: {why}"


def of_broker(body: Mapping[str, Any]) -> dict[str, Any]:
    """The broker's report of one submission; its id as `task.id` begins."""
    report = dict(body)
    if isinstance(report.get("id"), bytes):
        report["id"] = report["id"].hex()
    return report


def of_open(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reports of the open submissions.

    Raises:
        ProtocolFault: the broker does not know the question; it has answered another one.
    """
    tasks = body.get("tasks")
    if not isinstance(tasks, list):
        raise ProtocolFault("this broker is too old to list tasks")
    return [of_broker(task) for task in tasks]


def of_jobs(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reports of durable tasks; a key is text where it can be, else bytes.

    Raises:
        ProtocolFault: the broker does not know the question.
    """
    jobs = body.get("jobs")
    if not isinstance(jobs, list):
        raise ProtocolFault("this broker is too old to list durable tasks")
    return [{**of_broker(job), "key": _text(job.get("key"))} for job in jobs]


def _text(key: bytes | None) -> str | bytes | None:
    try:
        return None if key is None else key.decode()
    except UnicodeDecodeError:
        return key


def eta_s(report: Mapping[str, Any]) -> float | None:
    """Seconds until the outcome is expected, 0 once it is there; None if nobody can tell."""
    if report.get("state") in _ENDED:
        return 0.0
    eta_ms = report.get("eta_ms")
    return None if eta_ms is None else eta_ms / 1000.0


def why(report: Mapping[str, Any]) -> str:
    """What a task waits for, in one line; from less exact facts if the broker does not say."""
    told = report.get("why")
    if told:
        return str(told)
    if report.get("state") in _ENDED:
        return f"it has ended: {report['state']}"
    if report.get("workers"):
        return f"it runs on {', '.join(report['workers'])}"
    if report.get("is_waiting_for_kernel"):
        return f"no worker offers {report.get('kernel')!r} yet"
    if report.get("ahead"):
        return f"it is queued behind {report['ahead']} rows"
    return f"it is {report.get('state', 'unknown')}"


def submission_id(text: str) -> bytes:
    """The id of a submission from 32 hex digits, or from a task's id, which has a row behind them.

    Raises:
        InvalidInput: it is neither.
    """
    digits = text.partition("/")[0]
    try:
        id_ = bytes.fromhex(digits)
    except ValueError:
        id_ = b""
    if len(digits) != 32 or len(id_) != 16:
        raise InvalidInput(f"a task's id begins with 32 hex digits, unlike {text!r}")
    return id_
