"""Somebody who wants things done, by one client or two, and asks with the next client for what the last one left behind."""

from typing import TYPE_CHECKING

from penstock.client.run import Options
from simulation.client import Client
from simulation.tasks import Task

if TYPE_CHECKING:
    from simulation.world import World


class User:
    """Somebody with a principal of its own, tasks, and one client or two."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.tasks: list[Task] = []
        self.clients: dict[str, Client] = {}
        self._num_clients = 0

    def connect(self) -> Client:
        self._num_clients += 1
        name = f"{self.name}.{self._num_clients}"
        self.world.principals[name] = self.name
        client = self.clients[name] = Client(self, name)
        self.world.timeline.note(name, "starts")
        return client

    @property
    def is_content(self) -> bool:
        """All tasks are over, or given up."""
        return all(task.is_over or task.is_given_up for task in self.tasks)

    def lose(self, client: Client, is_gentle: bool, away_s: float) -> None:
        """A client ends; what was durable is asked for by the next one, or again by the other one."""
        del self.clients[client.name]
        left = list(client.tasks)
        client.may_be_forgotten()
        client.end(is_gentle)
        for task in sorted(left, key=lambda task: task.number):
            others = any(task in other.tasks for other in self.clients.values())
            if not task.options.is_durable:
                task.is_given_up = task.is_given_up or not others
        self.world.timeline.after(away_s, self._replace)

    def _replace(self) -> None:
        if not self.clients:
            self.connect()
        client = next(iter(self.clients.values()))
        if self.world.timeline.random.random() < 0.5:  # just when the answers are on their way
            self.world.timeline.after(self.world.timeline.random.uniform(0.001, 0.006), client.cut)
        for task in self.tasks:
            is_open = not task.is_over and not task.is_given_up
            if is_open and not any(task in other.tasks for other in self.clients.values()):
                client.fetch(task, is_taken=self.world.timeline.random.random() < 0.3)

    def options(self, number: int, is_durable: bool, timeout: float | None) -> Options:
        return Options(timeout=timeout, is_durable=is_durable, key=b"task-%d" % number)
