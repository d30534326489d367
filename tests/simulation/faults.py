"""What may go wrong, each kind by name. A seed switches some of them on and decides when they strike.

Knows what each does to the world; does not know what should come of it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.broker.storage.records import StorageError
from simulation.broker import CONFIG
from simulation.client import Client
from simulation.network import DOWN, UP
from simulation.supervisor import Supervisor

if TYPE_CHECKING:
    from simulation.world import World


def _worker(world: "World") -> Supervisor:
    return world.timeline.random.choice(world.supervisors)


def _client(world: "World") -> Client | None:
    clients = [client for user in world.users for client in user.clients.values()]
    return world.timeline.random.choice(clients) if clients else None


def _peer(world: "World") -> str:
    random = world.timeline.random
    names = [supervisor.name for supervisor in world.supervisors]
    names += [client.name for user in world.users for client in user.clients.values()]
    return random.choice(names)


def broker_crash(world: "World") -> None:
    """The broker is killed; what its disk had not made safe is lost, all but a beginning of it perhaps."""
    if world.timeline.random.random() < 0.5:
        world.broker.is_doomed = True
    else:
        world.broker.crash("kill -9", world.timeline.random.choice((0.01, 0.1, 0.5, 2.0, 5.0)))


def broker_pause(world: "World") -> None:
    """The broker stands still, for less or more than its peers' patience."""
    world.broker.pause(world.timeline.random.choice((0.1, 1.0, 3.0, 6.0)))


def worker_crash(world: "World") -> None:
    """A worker's process is killed."""
    _worker(world).kill()


def worker_quit(world: "World") -> None:
    """A worker is interrupted twice: it leaves with what it holds."""
    _worker(world).quit()


def worker_drain(world: "World") -> None:
    """A worker is asked to stop, and finishes what it holds."""
    _worker(world).drain()


def worker_pause(world: "World") -> None:
    """A worker stands still, for less or more than its liveness, and goes on with what it knew."""
    _worker(world).pause(world.timeline.random.choice((0.05, 0.5, 1.5, 2.5, 5.0)))


def device_fault(world: "World") -> None:
    """A device breaks under whatever it runs next; the worker leaves with status 86."""
    worker = _worker(world).worker
    if worker is not None:
        worker.engine.breaks_next = True


def slow_kernel(world: "World") -> None:
    """A device is slow for a while."""
    worker = _worker(world).worker
    if worker is not None:
        engine = worker.engine
        engine.slowness = world.timeline.random.choice((5.0, 30.0))
        world.timeline.after(1.0, setattr, engine, "slowness", 1.0)


def client_death(world: "World") -> None:
    """A client's process is killed; its user comes back with another one and asks for the durable tasks."""
    client = _client(world)
    if client is not None:
        client._user.lose(client, False, world.timeline.random.choice((0.05, 1.0, 6.0)))


def client_goodbye(world: "World") -> None:
    """A client closes with tasks open."""
    client = _client(world)
    if client is not None:
        client._user.lose(client, True, world.timeline.random.choice((0.05, 1.0)))


def client_pause(world: "World") -> None:
    """A client stands still, for less or more than its session lives."""
    client = _client(world)
    if client is not None and not client.is_paused:
        client.is_paused = True
        seconds = world.timeline.random.choice((0.3, 2.0, 6.0))
        world.timeline.note(client.name, f"stands still for {seconds:.2f} s")
        if seconds > CONFIG.session_ttl_s:
            client.may_be_forgotten()
        world.timeline.after(seconds, _resume, client)


def _resume(client: Client) -> None:
    client.is_paused = False
    client.wake()


def disconnect(world: "World") -> None:
    """A connection breaks. Its peer connects again by itself; what was on its way is lost, or a part of it."""
    name = _peer(world)
    world.timeline.note("network", f"the connection of {name} breaks")
    for supervisor in world.supervisors:
        if supervisor.name == name and supervisor.worker is not None:
            supervisor.worker.cut()
    for user in world.users:
        if name in user.clients:
            user.clients[name].cut()


def partition(world: "World") -> None:
    """Nothing gets through to or from somebody, or in one direction only; then it all comes."""
    random, name = world.timeline.random, _peer(world)
    directions = random.choice(((UP, DOWN), (UP,), (DOWN,)))
    seconds = random.choice((0.2, 1.0, 3.0, 7.0))
    world.timeline.note("network", f"{name} is cut off {'+'.join(directions)} for {seconds:.1f} s")
    world.network.block(name, directions)
    if seconds > CONFIG.session_ttl_s:
        for client in (user.clients[name] for user in world.users if name in user.clients):
            client.may_be_forgotten()
    world.timeline.after(seconds, world.network.unblock, name)


def delays(world: "World") -> None:
    """Some connections are slow, so that others overtake them."""
    random = world.timeline.random
    for connection in list(world.network.routes.values()):
        if random.random() < 0.5:
            connection.slowness = random.choice((0.02, 0.2, 0.8))


def full_pipe(world: "World") -> None:
    """A peer's pipe is full: the broker takes it for gone, though it is not."""
    name = _peer(world)
    world.network.full.add(name)
    world.timeline.after(1.0, world.network.full.discard, name)


def slow_disk(world: "World") -> None:
    """Syncing takes its time."""
    world.broker.slow_disk_s = world.timeline.random.choice((0.02, 0.3, 1.0))
    world.timeline.after(1.5, setattr, world.broker, "slow_disk_s", 0.0)


def disk_error(world: "World") -> None:
    """A sync fails (EIO): nothing can be written any more, so the broker ends and starts again."""
    if world.broker.is_up:
        world.timeline.note("disk", "EIO")
        world.broker.disk.failure = StorageError("EIO")


def disk_full(world: "World") -> None:
    """There is no space for more tasks (ENOSPC) for a while."""
    world.broker.disk.is_full = True
    world.timeline.note("disk", "ENOSPC")
    world.timeline.after(1.5, world.free_disk)


def clock_jump(world: "World") -> None:
    """The wall clock jumps, and the broker that starts next goes by it."""
    by = world.timeline.random.choice((-100.0, -3.0, 3.0, 100.0))
    world.timeline.note("clock", f"jumps by {by:+.0f} s")
    world.oracle.clock_jumped(by)
    world.broker.crash("kill -9 at a jump of the clock", 0.2)


FAULTS: dict[str, Callable[["World"], None]] = {
    fault.__name__: fault
    for fault in (
        broker_crash, broker_pause, worker_crash, worker_quit, worker_drain, worker_pause, device_fault, slow_kernel,
        client_death, client_goodbye, client_pause, disconnect, partition, delays, full_pipe, slow_disk, disk_error,
        disk_full, clock_jump,
    )
}  # fmt: skip
INPUTS = ("poison", "raises", "cancels", "time_limits", "twins")
"""Of what users submit: rows that kill, rows that raise, cancelling, time limits, the same key from two clients."""
KINDS = (*FAULTS, *INPUTS)
