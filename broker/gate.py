"""Who may come in over tcp: the broker's half of CURVE and ZAP (RFC 27), answered in the broker's own loop.

A socket asks the gate at each handshake; the domain says which side it is, the side which roles may enter. The name of whoever
was let in travels with each of its messages as its public key, so that a key revoked meanwhile is seen at the next one.
Knows keys, roles and handshakes. Does not know messages, nor what a role may do once inside.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from penstock.broker.address import Address
from penstock.broker.curve import FAILED_EVENTS, show_key
from penstock.broker.keys import ADMIN, CLIENT, WORKER, AllowedKey, KeyFolder, OwnKey, draw
from penstock.broker.state import BACK, FRONT

log = logging.getLogger("penstock.broker")

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ROLES_OF: Final[Mapping[str, frozenset[str]]] = {FRONT: frozenset((CLIENT, ADMIN)), BACK: frozenset((WORKER,))}
DOMAINS: Final = {f"penstock.{side}".encode(): side for side in ROLES_OF}
MAX_ADDRESSES: Final = 256
MAX_REQUESTS_PER_TURN: Final = 256
SELF_TEST_S: Final = 5.0
_OK, _REFUSED, _BROKEN = b"200", b"400", b"500"
_SUCCEEDED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)


class GateError(ValueError):
    """The gate would not keep strangers out, or honest peers in: the broker must not start."""


def wants_keys(addresses: Sequence[Address], curve: str, has_keys: bool) -> bool:
    """Whether peers on tcp must show keys. Raises ValueError: they would have to, and cannot."""
    tcp = [address for address in addresses if not address.is_ipc]
    far = [address.url for address in tcp if not address.is_local]
    if far and curve == "off":
        raise ValueError(f"{far[0]} can be reached from other machines: it needs keys, so take away curve = \"off\"")
    if tcp and not has_keys and (far or curve == "on"):
        where = f"{far[0]} can be reached from other machines" if far else f"curve = \"on\" wants keys at {tcp[0].url}"
        raise ValueError(f"{where}, and no key is allowed: run `penstock keys new NAME --role worker` first (docs/keys.md)")
    return bool(tcp) and has_keys and curve != "off"


class Gate:
    """See the module.

    Args:
        counters: what it decides is counted here.
    Raises:
        KeyProblem: a key that cannot be used.
    """

    def __init__(self, context: "zmq.Context[Any]", folder: KeyFolder, counters: Counter[str]) -> None:
        self._folder = folder
        self._counters = counters
        self._own = folder.broker_key()
        self._allowed = {key.public: key for key in folder.allowed()}
        self._test_keys: dict[str, AllowedKey] = {}
        self._num_refused: OrderedDict[str, int] = OrderedDict()
        self._context = context
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    @property
    def public_key(self) -> str:
        """What peers must know of this broker."""
        return self._own.public

    def guard(self, s: "zmq.Socket[bytes]", side: str) -> None:
        """From its next `bind` on, let the socket ask here who comes in. CURVE without a domain would let in everybody."""
        s.set(zmq.CURVE_SERVER, 1)
        s.set(zmq.CURVE_SECRETKEY, self._own.secret.encode())
        s.set(zmq.ZAP_DOMAIN, f"penstock.{side}".encode())
        s.set(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def principal(self, public: str, side: str) -> str:
        """`role:name` of a key that may still be on this side, else nothing."""
        key = self._allowed.get(public)
        return key.principal if key is not None and key.role in ROLES_OF[side] else ""

    def reload(self) -> frozenset[str]:
        """Read the list again; the principals that were let in under keys which are allowed no more.

        Raises:
            KeyProblem: a file cannot be used; everything stays as it is.
        """
        wanted = {key.public: key for key in self._folder.allowed()}
        before = self._allowed
        self._allowed = wanted
        gone = frozenset(key.principal for public, key in before.items() if wanted.get(public) != key)
        if wanted != before:
            log.info("keys reloaded: %d allowed, not any more: %s", len(wanted), ", ".join(sorted(gone)) or "none")
        return gone

    def allows(self, principal: str) -> bool:
        """Whether some key of this `role:name` is allowed."""
        return any(key.principal == principal for key in self._allowed.values())

    def report(self) -> dict[str, Any]:
        """For status: how many keys, and who was refused most."""
        worst = sorted(self._num_refused.items(), key=lambda entry: -entry[1])[:8]
        return {"keys": len(self._allowed), "refused_by_address": dict(worst)}

    # --- handshakes ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Answer who has asked, up to a bound."""
        for _ in range(MAX_REQUESTS_PER_TURN):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self.answer(frames))

    def answer(self, frames: Sequence[bytes]) -> list[bytes]:
        """The reply to one request; whatever is in it, there is one, and it is a refusal unless all is right."""
        version, request = (*frames[:2], b"", b"")[:2]
        try:
            _, _, domain, address, _, mechanism, credentials = frames
            key = self._find(DOMAINS.get(domain), mechanism, credentials)
        except Exception:  # a handshake that nobody foresaw must not end the broker, nor let anyone in
            log.exception("a handshake could not be judged")
            self._counters["handshakes_broken"] += 1
            return [version, request, _BROKEN, b"malformed", b"", b""]
        if key is None:
            self._refused(address.decode("ascii", "replace"))
            return [version, request, _REFUSED, b"not allowed here", b"", b""]
        self._counters["handshakes_accepted"] += 1
        return [version, request, _OK, b"", key.public.encode(), b""]

    def _find(self, side: str | None, mechanism: bytes, credentials: bytes) -> AllowedKey | None:
        if side is None or mechanism != b"CURVE":
            return None
        public = z85.encode(credentials).decode()
        key = self._allowed.get(public) or self._test_keys.get(public)
        return key if key is not None and key.role in ROLES_OF[side] else None

    def _refused(self, address: str) -> None:
        self._counters["handshakes_refused"] += 1
        self._num_refused[address] = self._num_refused.pop(address, 0) + 1
        if len(self._num_refused) > MAX_ADDRESSES:
            self._num_refused.popitem(last=False)

    # --- self-test -------------------------------------------------------------------------------------------------

    def check(self, side: str, endpoint: str) -> None:
        """Knock at a socket of ours: with an allowed key, with a throw-away one, with one of another role, and with none.

        Raises:
            GateError: anybody but the first was let in, or the first was not.
        """
        right, wrong = (CLIENT, WORKER) if side == FRONT else (WORKER, CLIENT)
        allowed, misplaced, stranger = (draw("self-test", role, self._own.public) for role in (right, wrong, right))
        self._test_keys = {key.public: AllowedKey("self-test", key.role, key.public) for key in (allowed, misplaced)}
        counted, refused = self._counters.copy(), self._num_refused.copy()
        knocks = [
            _Knock(self._context, endpoint, key, label)
            for key, label in ((allowed, ""), (stranger, "a throw-away key"), (misplaced, f"a {wrong}'s key"), (None, "no key"))
        ]
        try:
            self._await(knocks)
            _judge(knocks, endpoint)
        finally:
            for knock in knocks:
                knock.close()
            self._test_keys = {}
            self._counters.clear()
            self._counters.update(counted)
            self._num_refused = refused

    def _await(self, knocks: Sequence["_Knock"]) -> None:
        end = time.monotonic() + SELF_TEST_S
        poller = zmq.Poller()
        for s in (self.socket, *(knock.events for knock in knocks)):
            poller.register(s, zmq.POLLIN)
        while any(knock.outcome is None for knock in knocks) and (left := end - time.monotonic()) > 0:
            poller.poll(int(left * 1000) + 1)
            self.turn()
            for knock in knocks:
                knock.look()

    def close(self) -> None:
        self.socket.close(0)


class _Knock:
    """One attempt to come in. `outcome`: the event that ended its handshake."""

    def __init__(self, context: "zmq.Context[Any]", endpoint: str, key: OwnKey | None, stranger: str) -> None:
        self.stranger = stranger
        self.outcome: int | None = None
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.IPV6, int("[" in endpoint))
        show_key(self._socket, key)
        self.events = self._socket.get_monitor_socket(_SUCCEEDED | FAILED_EVENTS)
        self._socket.connect(endpoint.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))

    def look(self) -> None:
        while self.outcome is None and self.events.poll(0):
            self.outcome = int(parse_monitor_message(self.events.recv_multipart())["event"])

    def close(self) -> None:
        self._socket.disable_monitor()
        self.events.close(0)
        self._socket.close(0)


def _judge(knocks: Sequence[_Knock], endpoint: str) -> None:
    for knock in knocks:
        if knock.outcome is None:
            raise GateError(f"{endpoint} did not answer a handshake within {SELF_TEST_S:.0f} s")
        if (knock.outcome == _SUCCEEDED) != (not knock.stranger):
            what = f"lets in {knock.stranger}" if knock.stranger else "refuses an allowed key"
            raise GateError(f"{endpoint} {what}: the broker does not start")
