"""Simulation: many flocks, one large world of circles, many grids; against the same steps as broadcasts in plain torch."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from kernel_cases import FLOOR, Case
from penstock.kernels.ops import AgentState, Boids, Circles, GridWorld, simulate
from penstock.kernels.simulate import reference

STEPS = 4
"""Steps per call."""


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    yield _boids(100 if is_quick else 1000, 64, device)
    if not is_quick:
        yield _boids(1, 4096, device)
    sizes = (1_000_000,) if is_cuda else (10_000, 100_000)
    for num_agents in sizes[:1] if is_quick else sizes:
        yield _circles(num_agents, device)
    yield _grid(100 if is_quick else 1000, 64, 32, device)


def _crowd(num_worlds: int, num_agents: int, device: torch.device) -> AgentState:
    g = torch.Generator(device).manual_seed(0)
    positions = torch.rand(num_worlds, num_agents, 2, generator=g, device=device)
    return AgentState.start(positions, 0.1 * torch.randn(positions.shape, generator=g, device=device))


def _first(state: AgentState, num_worlds: int) -> AgentState:
    columns = (state.positions, state.velocities, state.steps_done, state.seeds, state.rewards)
    return AgentState(*(None if column is None else column[:num_worlds] for column in columns))


def _compare(ours: AgentState, theirs: AgentState) -> None:
    difference = float((ours.positions - theirs.positions).abs().max())
    assert difference <= 1e-5, f"positions differ by {difference:g}"


def _boids(num_worlds: int, num_agents: int, device: torch.device) -> Case:
    state, world = _crowd(num_worlds, num_agents, device), Boids()
    few = _first(state, 8)

    def check() -> None:
        ours = _first(simulate(world, state, steps=1), 8)
        _compare(ours, reference.simulate(world, few, steps=1))

    # Every step reads and writes positions and velocities, and reads eight parameters; 30 operations per pair.
    num_bytes = STEPS * num_worlds * num_agents * (32 + 32)
    num_flops = STEPS * num_worlds * num_agents**2 * 30
    peers: dict[str, Callable[[], Any]] = {"torch": lambda: _broadcast_flock(world, state)}
    if importlib.util.find_spec("vmas") is not None:
        peers["vmas"] = _vmas_flock(num_worlds, device)
    goals = {"torch": 10.0 if device.type == "cuda" else 0.95}
    return Case(
        "simulate", f"boids {num_worlds}x{num_agents}, {STEPS} steps", lambda: simulate(world, state, steps=STEPS), check,
        peers, num_bytes, num_flops, goals=goals,
    )  # fmt: skip


def _broadcast_flock(world: Boids, state: AgentState) -> tuple[torch.Tensor, torch.Tensor]:
    """The same steps as a simulator in vectorised torch writes them: all pairs of all worlds at once."""
    x, v = state.positions, state.velocities
    for _ in range(STEPS):
        d = x[:, None] - x[:, :, None]
        d = d - world.size * torch.round(d / world.size)
        distance = d.norm(dim=-1)
        near = (distance < world.perception).to(x.dtype)
        r2 = world.separation_radius**2
        weight = (r2 / (distance**2 + 0.01 * r2) - 1 / 1.01).clamp(min=0)
        count = (near.sum(-1, keepdim=True) - 1).clamp(min=1)
        away = -(d * weight[..., None]).sum(2)
        align = ((v[:, None] - v[:, :, None]) * near[..., None]).sum(2) / count
        cohere = (d * near[..., None]).sum(2) / count
        v = v + 0.02 * (world.separation * away + world.alignment * align + world.cohesion * cohere)
        speed = v.norm(dim=-1, keepdim=True)
        v = v * speed.clamp(world.min_speed, world.max_speed) / speed.clamp(min=1e-12)
        x = torch.remainder(x + 0.02 * v, world.size)
    return x, v


def _vmas_flock(num_worlds: int, device: torch.device) -> Callable[[], Any]:
    """VMAS's own flocking scenario: other rules and fewer agents, so no goal is set against it."""
    import vmas

    env = vmas.make_env("flocking", num_envs=num_worlds, device=str(device), n_agents=64)
    actions = [torch.zeros(num_worlds, 2, device=device) for _ in env.agents]

    def run() -> None:
        for _ in range(STEPS):
            env.step(actions)

    return run


def _circles(num_agents: int, device: torch.device) -> Case:
    world, state = Circles(radius=0.4 / num_agents**0.5), _crowd(1, num_agents, device)
    is_small = num_agents <= 10_000

    def check() -> None:
        """A part of a large crowd, with radii as if it were alone."""
        if is_small:
            _compare(simulate(world, state, steps=1, dt=1e-3), reference.simulate(world, state, steps=1, dt=1e-3))
            return
        part = AgentState.start(state.positions[:, :5000], state.velocities[:, :5000])
        place = replace(world, radius=0.4 / 5000**0.5, max_cells=None)
        _compare(simulate(place, part, steps=1, dt=1e-3), reference.simulate(place, part, steps=1, dt=1e-3))
        moved = simulate(world, state, steps=1, dt=1e-3)
        change = (moved.velocities - state.velocities).double().sum(1)
        assert float(change.abs().max()) < 1e-3 * num_agents**0.5, "momentum is not kept"

    peers = {"torch": lambda: _all_pairs(world, state)} if is_small else {}
    goals = {"torch": 10.0 if device.type == "cuda" else 0.95} if is_small else {}
    # 60 bytes per agent and step: positions, velocities, radius and mass read, the first two written, cells sorted once.
    # At 3.35 TB/s, 0.0085 of that floor are 2.1 ms a step for a million.
    return Case(
        "simulate", f"circles {num_agents:,}, {STEPS} steps", lambda: simulate(world, state, steps=STEPS, dt=1e-3), check,
        peers, STEPS * num_agents * 60, goals={**goals, **({FLOOR: 0.0085} if device.type == "cuda" else {})},
    )  # fmt: skip


def _all_pairs(world: Circles, state: AgentState, rows: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """The same steps with every pair compared, some rows at a time so that it fits in memory."""
    x, v = state.positions[0], state.velocities[0]
    touch = 2 * world.radius
    for _ in range(STEPS):
        force = torch.empty_like(x)
        for i in range(0, len(x), rows):
            d = x[None] - x[i : i + rows, None]
            d = d - torch.round(d)
            distance = d.norm(dim=-1)
            push = torch.where(distance > 0, world.stiffness * (touch - distance).clamp(min=0) / distance, 0.0)
            force[i : i + rows] = -(push[..., None] * d).sum(1)
        v = v + 1e-3 * force
        x = torch.remainder(x + 1e-3 * v, 1.0)
    return x, v


def _grid(num_worlds: int, num_agents: int, side: int, device: torch.device) -> Case:
    g = torch.Generator(device).manual_seed(0)
    policy = torch.randint(0, 5, (1, 4, side, side), generator=g, device=device).to(torch.int8)
    cells = torch.rand(num_worlds, side * side, generator=g, device=device).argsort(1)[:, :num_agents]
    goals = torch.randint(0, side, (num_worlds, num_agents, 2), generator=g, device=device)
    layers = torch.randint(0, 4, (num_worlds, num_agents), generator=g, device=device)
    world, state = GridWorld(policy, goals, layers), AgentState.start(torch.stack([cells % side, cells // side], -1).int())

    def check() -> None:
        few = GridWorld(policy, goals[:8], layers[:8])
        ours = _first(simulate(world, state, steps=STEPS), 8)
        theirs = reference.simulate(few, _first(state, 8), steps=STEPS)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.rewards, theirs.rewards)

    # Per agent and step: position read and written, goal, layer, last move, rewards, its cell and its neighbours' cells.
    num_bytes = STEPS * num_worlds * num_agents * 64
    return Case(
        "simulate", f"grid {num_worlds}x{num_agents} on {side}x{side}, {STEPS} steps",
        lambda: simulate(world, state, steps=STEPS), check, {"torch": lambda: _pairwise_grid(world, state)}, num_bytes,
        goals={"torch": 10.0 if device.type == "cuda" else 0.95},
    )  # fmt: skip


def _pairwise_grid(world: GridWorld, state: AgentState) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rules, without refusals counted, with every agent compared with every other."""
    policy, x = world.policy[0].long(), state.positions.long()
    side, layers, device = policy.shape[-1], world.layers, x.device
    moves = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], device=device)
    arrivals = torch.zeros(x.shape[:2], dtype=torch.int64, device=device)
    for k in range(STEPS):
        wish = policy[layers, x[..., 1], x[..., 0]].clamp(min=0)
        to = (x + moves[wish]).clamp(0, side - 1)
        can_move = (to != x).any(-1) & (policy[layers, to[..., 1], to[..., 0]] >= 0)
        can_move &= ~(to[:, :, None] == x[:, None]).all(-1).any(-1)
        turn = (wish - 1 + k) % 4
        is_rival = (to[:, :, None] == to[:, None]).all(-1) & can_move[:, None]
        can_move &= ~(is_rival & (turn[:, None] < turn[:, :, None])).any(-1)
        x = torch.where(can_move[..., None], to, x)
        arrivals += can_move & (x == world.goals).all(-1)
    return x, arrivals
