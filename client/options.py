"""What `options(...)` accepts, checked."""

from typing import Any, Final

from penstock.broker.protocol import MAX_TIMEOUT_MS, NUM_PRIORITIES
from penstock.client.errors import InvalidInput
from penstock.client.run import Options

PRIORITIES: Final = {"high": 1, "medium": 5, "low": 8}
MAX_KEY_BYTES: Final = 128
UNCHANGED: Final[Any] = object()


def change(
    base: Options,
    priority: int | str | None = None,
    timeout: float | None = UNCHANGED,
    durable: bool | None = None,
    idempotency_key: str | bytes | None = None,
) -> Options:
    """`base` with what was given.

    Raises:
        InvalidInput: a value out of bounds.
    """
    key = check_key(idempotency_key)
    return Options(
        priority=base.priority if priority is None else _priority(priority),
        timeout=base.timeout if timeout is UNCHANGED else check_timeout(timeout),
        is_durable=base.is_durable if durable is None else bool(durable),
        key=base.key if key is None else key,
    )


def check_key(idempotency_key: str | bytes | None) -> bytes | None:
    key = idempotency_key.encode() if isinstance(idempotency_key, str) else idempotency_key
    if key is not None and not 0 < len(key) <= MAX_KEY_BYTES:
        raise InvalidInput(f"idempotency_key must have 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")
    return key


def check_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not abs(timeout) <= MAX_TIMEOUT_MS / 1000:
        raise InvalidInput(f"timeout must be seconds, at most {MAX_TIMEOUT_MS / 1000:.0f}, or None; not {timeout!r}")
    return float(timeout)


def _priority(priority: int | str) -> int:
    number = PRIORITIES.get(priority) if isinstance(priority, str) else priority
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < NUM_PRIORITIES:
        raise InvalidInput(f"priority must be high, medium, low or 0 (soonest) to {NUM_PRIORITIES - 1}; not {priority!r}")
    return number
