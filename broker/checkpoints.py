"""What long streaming tasks can go on from: the newest state of each row, as its kernel has made it.

Knows whose checkpoint counts, what there is room for, and which worker may be given one. Does not know what is in it, nor
how it gets to a disk (`durable.py`).
"""

from typing import Any

from penstock.broker.columns import any_shared
from penstock.broker.config import BrokerConfig
from penstock.broker.protocol import Checkpoint
from penstock.broker.state import BrokerState
from penstock.broker.tasks import LEASED, Lease, Piece, Saved
from penstock.broker.wire import ProtocolError

MAX_ACQUITTALS = 16
"""So often a checkpoint makes the deaths before it count no more: a row that only seems to get on must end, too."""


def limits(config: BrokerConfig) -> dict[str, Any]:
    """What a worker is told of them in its `welcome`."""
    max_bytes = min(config.max_checkpoint_bytes, config.max_message_bytes)
    return {"checkpoint_ms": 1000.0 * config.checkpoint_s, "max_checkpoint_bytes": max_bytes} if max_bytes else {}


class Checkpoints:
    """See the module. The lease says who may write: a checkpoint under another one than that which holds the row is late."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state

    def keep(self, lease: Lease, m: Checkpoint, now: float) -> None:
        """Replace what is kept of a row, if there is room."""
        counters, piece = self._state.counters, lease.pieces[0]
        if not lease.queue.spec.has_checkpoints or lease.mode != "stream":
            raise ProtocolError(f"a checkpoint of {lease.queue.spec.name!r}, which offers none")
        if m.block.num_rows != 1 or any_shared([m.block]):
            raise ProtocolError("a checkpoint is a block of one row, in frames")
        lease.worker.progress_at = now
        if piece.state != LEASED:
            counters["late_checkpoints"] += 1
            return
        if not self._has_room(piece, m.block.nbytes):
            counters["checkpoints_without_room"] += 1
            return
        counters["checkpoints"] += 1
        old, saved = piece.saved, Saved(lease.queue.spec.digest, m.block, m.part)
        if old is not None:
            saved.num_acquitted, saved.number = old.num_acquitted, old.number
        self._acquit(piece, saved)
        self._state.ledger.save(piece, saved)
        self._state.journal.save(piece, saved, now)

    def _has_room(self, piece: Piece, num_bytes: int) -> bool:
        """Half of the queue's bytes are for tasks alone."""
        config, ledger = self._state.config, self._state.ledger
        old_bytes = piece.saved.block.nbytes if piece.saved is not None else 0
        is_fitting = ledger.open_bytes + num_bytes - old_bytes <= config.max_queue_bytes // 2
        return num_bytes <= config.max_checkpoint_bytes and is_fitting

    @staticmethod
    def _acquit(piece: Piece, saved: Saved) -> None:
        """It has come past where its workers were lost, as far as anybody can tell. It goes on alone all the same."""
        if piece.deaths and saved.num_acquitted < MAX_ACQUITTALS:
            saved.num_acquitted += 1
            piece.deaths = 0

    def of(self, lease: Lease) -> Saved | None:
        """What the row of a streaming lease goes on from. Another version of its kernel begins anew."""
        piece = lease.pieces[0]
        saved = piece.saved
        if saved is None:
            return None
        if saved.digest != lease.queue.spec.digest:
            self._state.counters["checkpoints_outdated"] += 1
            self._state.ledger.save(piece, None)
            self._state.journal.unsave(saved)
            return None
        self._state.counters["resumed"] += 1
        return saved
