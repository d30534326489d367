"""`simulate` against its reference, and what physics and the rules of a grid promise, in both of its forms."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import InvalidInput, backends
from penstock.kernels.ops import AgentState, Boids, Circles, GridWorld, simulate
from penstock.kernels.simulate import circles, noise, reference
from penstock.kernels.simulate.worlds import WALL, cells_per_side

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = ["torch", "triton"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form in turn, with all memory poisoned that it gets."""
    if request.param not in backends.torch_or_triton(DEVICE):
        pytest.skip("triton is not installed")

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -(2**30)) if tensor.dtype != torch.int8 else tensor

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    with backends.forced(request.param):
        yield request.param


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flock(num_worlds: int, num_agents: int, size: float = 1.0, seed: int = 0) -> AgentState:
    g = rng(seed)
    positions = torch.rand(num_worlds, num_agents, 2, generator=g) * size
    velocities = 0.2 * torch.randn(num_worlds, num_agents, 2, generator=g)
    return AgentState.start(positions.to(DEVICE), velocities.to(DEVICE), seed=9)


def maze(num_worlds: int, num_agents: int, seed: int = 0) -> tuple[GridWorld, AgentState]:
    """Random policies of two layers, walls on a sixth of the cells, agents on free ones."""
    g, height, width = rng(seed), 7, 9
    policy = torch.randint(0, 5, (num_worlds, 2, height, width), generator=g)
    is_wall = torch.rand(num_worlds, 1, height, width, generator=g) < 1 / 6
    policy = policy.masked_fill(is_wall, WALL).to(torch.int8)
    cells = torch.where(is_wall.flatten(1), 2.0, torch.rand(num_worlds, height * width, generator=g)).argsort(1)[:, :num_agents]
    positions = torch.stack([cells % width, cells // width], -1).int()
    goals = torch.randint(0, 7, (num_worlds, num_agents, 2), generator=g)
    layers = torch.randint(0, 2, (num_worlds, num_agents), generator=g)
    return GridWorld(policy.to(DEVICE), goals.to(DEVICE), layers.to(DEVICE)), AgentState.start(positions.to(DEVICE))


def assert_near(ours: AgentState, theirs: AgentState, scale: float = 1.0) -> None:
    torch.testing.assert_close(ours.positions, theirs.positions, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(ours.velocities, theirs.velocities, rtol=1e-5, atol=1e-5 * scale)
    assert torch.equal(ours.steps_done, theirs.steps_done)


def assert_same(ours: AgentState, theirs: AgentState) -> None:
    for name in ("positions", "velocities", "steps_done", "seeds", "rewards"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None and other is None) or torch.equal(one, other), name


# --- against the reference


@pytest.mark.parametrize("has_walls", [False, True])
@pytest.mark.parametrize(("num_worlds", "num_agents"), [(1, 1), (3, 7), (2, 65)])
def test_boids_are_those_of_the_reference(form: str, has_walls: bool, num_worlds: int, num_agents: int) -> None:
    state = flock(num_worlds, num_agents, 2.0)
    shape = (num_worlds, num_agents)
    world = Boids(
        torch.full((num_worlds,), 2.0, device=DEVICE), torch.rand(shape, generator=rng(1)).to(DEVICE) * 0.7, 0.3,
        max_speed=torch.rand(num_agents, generator=rng(2)).to(DEVICE) + 0.1, noise=1.0, has_walls=has_walls,
    )  # fmt: skip
    assert_near(simulate(world, state, steps=2), reference.simulate(world, state, steps=2), 2.0)


@pytest.mark.parametrize("has_walls", [False, True])
@pytest.mark.parametrize(("num_worlds", "num_agents"), [(1, 1), (2, 67)])
def test_circles_are_those_of_the_reference(form: str, has_walls: bool, num_worlds: int, num_agents: int) -> None:
    state = flock(num_worlds, num_agents, 2.0)
    radius = torch.rand(num_worlds, num_agents, generator=rng(1)).to(DEVICE) * 0.08 + 0.02
    mass = torch.rand(num_agents, generator=rng(2)).to(DEVICE) + 0.5
    world = Circles(2.0, radius, mass, 50.0, 1.0, has_walls)
    assert world.max_cells is not None
    assert world.max_cells >= 8
    assert_near(simulate(world, state, steps=2), reference.simulate(world, state, steps=2), 2.0)


@pytest.mark.parametrize("has_actions", [False, True])
@pytest.mark.parametrize(("num_worlds", "num_agents"), [(1, 1), (3, 7), (4, 40)])
def test_grids_are_equal_to_the_reference(form: str, has_actions: bool, num_worlds: int, num_agents: int) -> None:
    world, state = maze(num_worlds, num_agents)
    actions = torch.randint(-2, 7, (9, num_worlds, num_agents), generator=rng(5)).to(DEVICE) if has_actions else None
    ours = simulate(world, state, steps=9, actions=actions)
    assert_same(ours, reference.simulate(world, state, steps=9, actions=actions))
    if num_agents > 1:
        assert ours.rewards is not None
        assert ours.rewards[..., 1].any()


def test_a_grid_shared_by_all_worlds(form: str) -> None:
    world, state = maze(3, 5)
    shared = GridWorld(world.policy[:1], world.goals, world.layers)
    state = AgentState.start(state.positions[:1].expand(3, -1, -1))
    assert_same(simulate(shared, state, steps=4), reference.simulate(shared, state, steps=4))


@settings(max_examples=25, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=1, max_size=40),
    spread=st.sampled_from([0.0, 1e-6, 0.03]),
    radius=st.sampled_from([1 / 64, 1 / 32, 1 / 16, 1 / 8, 0.2, 0.3, 0.5]),
    has_walls=st.booleans(),
)
def test_cells_lose_no_contact(cells: list[tuple[int, int]], spread: float, radius: float, has_walls: bool) -> None:
    """Discs in heaps, on one spot, on the borders of cells and of the square."""
    positions = torch.tensor(cells)[None] / 16 + spread * torch.rand(1, len(cells), 2, generator=rng())
    positions = positions.clamp(max=1.0)
    state = AgentState.start(positions, torch.randn(positions.shape, generator=rng(1)))
    world = Circles(1.0, radius, 1.0, 10.0, 0.5, has_walls)
    for name in backends.torch_or_triton(torch.device("cpu")):
        with backends.forced(name):
            ours = simulate(world, state, steps=1, dt=0.01)
        assert_near(ours, reference.simulate(world, state, steps=1, dt=0.01))


@pytest.mark.parametrize("limit", [1, 50, 1 << 20])
def test_a_heap_is_compared_in_runs_of_any_length(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(circles, "_MAX_CANDIDATES", limit)
    g = rng()
    positions = torch.cat([torch.rand(1, 60, 2, generator=g) * 0.05, torch.rand(1, 90, 2, generator=g)], 1)
    world, state = Circles(1.0, 0.02, stiffness=20.0), AgentState.start(positions)
    with backends.forced("torch"):
        assert_near(simulate(world, state, steps=2), reference.simulate(world, state, steps=2))


@pytest.mark.parametrize("num_cells", [1, 2, 3, 4, 7, 48, 1000, 4096])
def test_cells_are_wider_than_a_diameter(num_cells: int) -> None:
    """Whatever the rounding: centres that are a diameter apart are at most one cell apart."""
    diameter = torch.tensor(1.0 / num_cells)
    side = cells_per_side(1.0, diameter / 2)
    assert side <= max(num_cells, 1)
    x = torch.linspace(0, 1 - float(diameter), 5001)[None, :, None].repeat(1, 1, 2)
    if num_cells > 1:
        one = circles.cell_of(x, torch.ones(1), side) % side
        other = circles.cell_of((x + diameter).clamp(max=1.0), torch.ones(1), side) % side
        assert (other - one).max() <= 1
    assert cells_per_side(1.0, 0.0) == 4096
    assert cells_per_side(torch.tensor([1.0, 0.5]), torch.tensor([[0.01], [0.1]])) == 2


# --- what holds in every world


def everyone() -> list[tuple[Boids | Circles | GridWorld, AgentState]]:
    return [
        (Boids(perception=0.3, noise=0.5), flock(3, 13)),
        (Circles(radius=0.08, damping=1.0), flock(3, 13)),
        maze(3, 20),
    ]  # fmt: skip


def one_of(world: Boids | Circles | GridWorld, state: AgentState, w: int) -> tuple[Boids | Circles | GridWorld, AgentState]:
    here = slice(w, w + 1)
    if isinstance(world, GridWorld):
        world = GridWorld(world.policy[here], world.goals[here], world.layers[here])  # type: ignore[index]
    columns = [getattr(state, name)[here] for name in ("positions", "velocities", "steps_done", "seeds")]
    return world, AgentState(*columns, None if state.rewards is None else state.rewards[here])


def skip_without_fixed_order(form: str) -> None:
    if form == "torch" and DEVICE.type == "cuda":
        pytest.skip("torch's sums on cuda have no fixed order")


@pytest.mark.parametrize("index", range(3))
def test_worlds_have_the_bits_that_they_have_alone(form: str, index: int) -> None:
    skip_without_fixed_order(form)
    world, state = everyone()[index]
    together = simulate(world, state, steps=2)
    for w in range(3):
        assert_same(one_of(world, together, w)[1], simulate(*one_of(world, state, w), steps=2))


def test_large_batches_have_the_bits_of_small_ones() -> None:
    """Enough worlds for several tiles and threads."""
    state = flock(500, 32)
    together = simulate(Boids(), state, steps=2)
    for w in (0, 250, 499):
        assert_same(one_of(Boids(), together, w)[1], simulate(*one_of(Boids(), state, w), steps=2))


@pytest.mark.parametrize("index", range(3))
def test_stopping_and_going_on_changes_no_bit(form: str, index: int) -> None:
    skip_without_fixed_order(form)
    world, state = everyone()[index]
    halfway = simulate(world, state, steps=1)
    copy = AgentState(*(None if x is None else x.clone() for x in (getattr(halfway, n) for n in AgentState.__slots__)))
    assert_same(simulate(world, copy, steps=2), simulate(world, state, steps=3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("index", range(2))
def test_a_broken_world_leaves_the_others_alone(form: str, index: int) -> None:
    skip_without_fixed_order(form)
    world, state = everyone()[index]
    positions, velocities = state.positions.clone(), state.velocities.clone()
    positions[1, ::2], velocities[1] = math.nan, math.inf
    ours = simulate(world, replace(state, positions=positions, velocities=velocities), steps=3)
    whole = simulate(world, state, steps=3)
    for w in (0, 2):
        assert_same(one_of(world, ours, w)[1], one_of(world, whole, w)[1])
    assert ours.positions[1, 0].isnan().all()


@pytest.mark.parametrize("world", [Boids(perception=0.4), Circles(radius=0.08, stiffness=20.0)])
@pytest.mark.parametrize("has_walls", [False, True])
def test_the_order_of_agents_does_not_matter(form: str, world: Boids | Circles, has_walls: bool) -> None:
    world, state = replace(world, has_walls=has_walls), flock(2, 33)
    order = torch.randperm(33, generator=rng(4)).to(DEVICE)
    shuffled = replace(state, positions=state.positions[:, order], velocities=state.velocities[:, order])
    ours, theirs = simulate(world, shuffled, steps=3), simulate(world, state, steps=3)
    assert_near(ours, replace(theirs, positions=theirs.positions[:, order], velocities=theirs.velocities[:, order]))


def test_the_order_of_agents_does_not_matter_in_a_grid(form: str) -> None:
    world, state = maze(2, 30)
    assert isinstance(world.layers, torch.Tensor)
    order = torch.randperm(30, generator=rng(4)).to(DEVICE)
    shuffled = GridWorld(world.policy, world.goals[:, order], world.layers[:, order])
    ours = simulate(shuffled, AgentState.start(state.positions[:, order]), steps=12)
    theirs = simulate(world, state, steps=12)
    assert theirs.rewards is not None
    assert ours.rewards is not None
    assert torch.equal(ours.positions, theirs.positions[:, order])
    assert torch.equal(ours.rewards, theirs.rewards[:, order])


@pytest.mark.parametrize("has_walls", [False, True])
@pytest.mark.parametrize("index", range(2))
def test_agents_stay_in_the_square(form: str, has_walls: bool, index: int) -> None:
    world: Boids | Circles = Circles(2.0, 0.05) if index else Boids(2.0, 0.5, min_speed=0.0, max_speed=9.0)
    world, state = replace(world, has_walls=has_walls), flock(2, 17, 2.0)
    state = replace(state, velocities=state.velocities * 40)
    edge = 0.05 if has_walls and index else 0.0
    for _ in range(6):
        state = simulate(world, state, steps=1, dt=0.1)
        assert (state.positions >= edge).all()
        assert (state.positions <= 2.0 - edge).all() if has_walls else (state.positions < 2.0).all()


def test_just_below_zero_is_not_the_side(form: str) -> None:
    """-1e-9 + 1 rounds to 1, which is 0."""
    state = AgentState.start(torch.zeros(1, 1, 2, device=DEVICE), torch.full((1, 1, 2), -1e-9, device=DEVICE))
    assert simulate(Boids(min_speed=0.0), state, steps=1, dt=1.0).positions.tolist() == [[[0.0, 0.0]]]


# --- boids


def test_speeds_stay_within_their_limits(form: str) -> None:
    state = flock(2, 40)
    low, high = torch.tensor([0.1, 0.2], device=DEVICE)[:, None], torch.tensor([0.15, 0.4], device=DEVICE)[:, None]
    moved = simulate(Boids(min_speed=low, max_speed=high, noise=3.0, separation=100.0), state, steps=5)
    speed = moved.velocities.norm(dim=-1)
    assert (speed >= low * (1 - 1e-5)).all()
    assert (speed <= high * (1 + 1e-5)).all()
    assert speed.std() > 0


def test_flocks_form() -> None:
    """The directions of a crowd that sees each other become one."""
    state = flock(1, 60)

    def order(state: AgentState) -> float:
        return float(torch.nn.functional.normalize(state.velocities, dim=-1).mean(1).norm())

    moved = simulate(Boids(perception=0.5), state, steps=400)
    assert order(state) < 0.4
    assert order(moved) > 0.95


def test_nobody_to_follow(form: str) -> None:
    positions = torch.tensor([[[0.1, 0.1], [0.6, 0.6]]], device=DEVICE)
    velocities = torch.tensor([[[0.1, 0.2], [-0.2, 0.0]]], device=DEVICE)
    moved = simulate(Boids(), AgentState.start(positions, velocities), steps=3, dt=0.1)
    torch.testing.assert_close(moved.velocities, velocities)
    torch.testing.assert_close(moved.positions, positions + 0.3 * velocities)


def test_boids_see_across_the_border(form: str) -> None:
    positions = torch.tensor([[[0.02, 0.5], [0.98, 0.5]]], device=DEVICE)
    world = Boids(perception=0.1, separation=0.0, alignment=0.0, cohesion=1.0, min_speed=0.0)
    moved = simulate(world, AgentState.start(positions), steps=1)
    assert moved.velocities[0, 0, 0] < 0 < moved.velocities[0, 1, 0]
    assert not simulate(replace(world, has_walls=True), AgentState.start(positions), steps=1).velocities.any()


def test_boids_on_one_spot_stay_finite_and_noise_parts_them(form: str) -> None:
    state = AgentState.start(torch.full((1, 5, 2), 0.5, device=DEVICE))
    assert simulate(Boids(), state, steps=3).positions.unique().tolist() == [0.5]
    parted = simulate(Boids(noise=1.0), state, steps=3).positions
    assert parted.isfinite().all()
    assert len(parted[0].unique(dim=0)) == 5


def test_noise_is_uniform_and_of_seed_step_and_agent_alone() -> None:
    keys = noise.keys(torch.tensor([0, 1, 1 << 40, 2**53]))
    draws = noise.uniform(keys, torch.tensor([3, 3, 3, 3]), 5000)
    assert len(set(keys.tolist())) == 4
    assert (draws >= -1).all()
    assert (draws < 1).all()
    assert abs(float(draws.mean())) < 4 * math.sqrt(1 / 3 / draws.numel())
    histogram = torch.histc(draws, 16, -1, 1)
    expected = draws.numel() / 16
    assert float(((histogram - expected) ** 2 / expected).sum()) < 37.7  # chi squared, 15 degrees, 0.1 %
    for other in (noise.uniform(keys, torch.tensor([4, 4, 4, 4]), 5000), draws.roll(1, 0), draws.roll(1, 1), draws.flip(-1)):
        assert abs(float((draws * other).mean()) * 3) < 4 / math.sqrt(draws.numel())
    assert torch.equal(noise.uniform(keys[1:2], torch.tensor([3]), 7), draws[1:2, :7])


# --- circles


def test_momentum_is_kept_and_energy_too_without_damping() -> None:
    state = flock(2, 40)
    mass = torch.rand(40, generator=rng(3)).to(DEVICE) + 0.5
    world = Circles(radius=0.04, mass=mass, stiffness=100.0)
    moved = simulate(world, state, steps=40, dt=0.002)
    before, after = ((mass[:, None] * s.velocities).double().sum(1) for s in (state, moved))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert (moved.velocities - state.velocities).abs().max() > 0.1
    assert abs(energy(world, moved) / energy(world, state) - 1) < 0.02


def energy(world: Circles, state: AgentState) -> float:
    d = state.positions[:, None] - state.positions[:, :, None]
    d = (d - world.size * (d / world.size).round()).double()
    overlap = (2 * world.radius - d.norm(dim=-1)).clamp(min=0)
    overlap.diagonal(dim1=1, dim2=2).zero_()
    spring = 0.25 * world.stiffness * overlap.square().sum()
    kinetic = 0.5 * torch.as_tensor(world.mass, device=DEVICE) * state.velocities.double().square().sum(-1)
    return float(spring + kinetic.sum())


def test_damping_takes_energy_away() -> None:
    state, world = flock(1, 50), Circles(radius=0.05, stiffness=50.0, damping=2.0)
    last = first = energy(world, state)
    for _ in range(8):
        state = simulate(world, state, steps=5, dt=0.002)
        assert energy(world, state) <= last * 1.001
        last = energy(world, state)
    assert last < 0.9 * first


def test_two_equal_discs_exchange_their_velocities() -> None:
    positions = torch.tensor([[[0.4, 0.5], [0.6, 0.5]]], device=DEVICE)
    velocities = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], device=DEVICE)
    moved = simulate(Circles(radius=0.05, stiffness=1e4), AgentState.start(positions, velocities), steps=200, dt=0.001)
    torch.testing.assert_close(moved.velocities, velocities.flip(1), rtol=0, atol=2e-2)


def test_discs_on_one_spot_part_and_momentum_is_kept(form: str) -> None:
    state = AgentState.start(torch.full((1, 5, 2), 0.25, device=DEVICE))
    moved = simulate(Circles(radius=0.05, stiffness=10.0), state, steps=1)
    assert moved.velocities[0, :, 0].tolist() == sorted(moved.velocities[0, :, 0].tolist(), reverse=True)
    assert len(moved.positions[0].unique(dim=0)) == 5
    assert float(moved.velocities.sum().abs()) < 1e-5


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (0.125, 0.5), (1.0 - 2**-24, 0.3)])
def test_discs_touch_across_borders(form: str, x: float, y: float) -> None:
    """Of cells (0.125 is one with eight cells a side) and of the square."""
    world = Circles(radius=0.06)
    assert world.max_cells == 8
    here = torch.tensor([x, y], device=DEVICE)
    for offset in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1), (0.07, -0.07)):
        there = (here + torch.tensor(offset, device=DEVICE)) % 1.0
        others = torch.rand(30, 2, generator=rng()).to(DEVICE) * 0.02 + 0.7  # a heap, so that there are eight cells a side
        state = AgentState.start(torch.cat([here[None], there[None], others])[None])
        moved = simulate(world, state, steps=1, dt=1e-3)
        push = moved.velocities[0, 1] * torch.tensor(offset, device=DEVICE)
        assert push.sum() > 0
        torch.testing.assert_close(moved.velocities[0, 0], -moved.velocities[0, 1])


def test_walls_are_elastic(form: str) -> None:
    positions = torch.tensor([[[0.1, 0.5], [0.5, 0.92]]], device=DEVICE)
    velocities = torch.tensor([[[-1.0, 0.1], [0.0, 2.0]]], device=DEVICE)
    moved = simulate(Circles(radius=0.05, has_walls=True), AgentState.start(positions, velocities), steps=1, dt=0.1)
    torch.testing.assert_close(moved.velocities, velocities * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=DEVICE))
    torch.testing.assert_close(moved.positions, torch.tensor([[[0.1, 0.51], [0.5, 0.78]]], device=DEVICE))


# --- grids


def test_agents_never_share_a_cell_nor_enter_a_wall(form: str) -> None:
    world, state = maze(3, 45, seed=2)
    actions = torch.randint(0, 5, (1, 3, 45), generator=rng(8)).to(DEVICE)
    for step in range(12):
        moved = simulate(world, state, steps=1, actions=actions.roll(step, 2))
        x, y = moved.positions.long().unbind(-1)
        assert ((x >= 0) & (x < 9) & (y >= 0) & (y < 7)).all()
        assert all(len(row.unique()) == 45 for row in y * 9 + x)
        assert (world.policy[torch.arange(3, device=DEVICE)[:, None], world.layers, y, x] != WALL).all()
        assert (moved.velocities.abs().sum(-1) <= 1).all()
        assert torch.equal(moved.velocities, moved.positions - state.positions)
        state = moved


def test_four_that_want_one_cell_take_turns(form: str) -> None:
    """Each direction gets the first turn once in four steps; the others are refused, and arrivals are counted."""
    around = torch.tensor([[[0, 1], [1, 0], [2, 1], [1, 2]]], dtype=torch.int32, device=DEVICE)
    policy = torch.zeros(1, 1, 3, 3, dtype=torch.int8, device=DEVICE)
    world = GridWorld(policy, torch.ones(1, 4, 2, dtype=torch.int32, device=DEVICE))
    actions = torch.tensor([[[1, 2, 3, 4]]], device=DEVICE)
    winners = []
    for step in range(4):
        moved = simulate(world, AgentState.start(around, steps_done=step), steps=1, actions=actions)
        assert moved.rewards is not None
        arrived = moved.rewards[0, :, 0].tolist()
        assert sorted(arrived) == [0, 0, 0, 1]
        assert moved.rewards[0, :, 1].tolist() == [1 - a for a in arrived]
        winners.append(arrived.index(1))
    assert sorted(winners) == [0, 1, 2, 3]


def test_two_cannot_swap_and_a_queue_waits(form: str) -> None:
    policy = torch.zeros(1, 1, 1, 4, dtype=torch.int8, device=DEVICE)
    world = GridWorld(policy, torch.zeros(1, 3, 2, dtype=torch.int32, device=DEVICE))
    positions = torch.tensor([[[0, 0], [1, 0], [2, 0]]], dtype=torch.int32, device=DEVICE)
    actions = torch.tensor([[[1, 3, 1]]], device=DEVICE)
    moved = simulate(world, AgentState.start(positions), steps=1, actions=actions)
    assert moved.positions[0, :, 0].tolist() == [0, 1, 3]


# --- what is refused, and sizes of nothing


def test_what_does_not_fit_is_refused() -> None:
    state = flock(2, 3)
    world, in_grid = maze(2, 3)
    actions = torch.zeros(1, 2, 3)
    refused = [
        (Boids(), in_grid, 1, None, "float32 or float64"),
        (world, state, 1, None, "int32"),
        (Boids(), state, -1, None, "steps must be"),
        (Boids(), state, 10**9, None, "steps must be"),
        (Boids(), state, 1, actions, "actions are"),
        (world, in_grid, 2, actions, "actions are"),
        (GridWorld(world.policy[0], world.goals), in_grid, 1, None, "policy must be"),
        (world, replace(in_grid, rewards=None), 1, None, "has rewards"),
    ]
    for place, who, steps, what, message in refused:
        with pytest.raises(InvalidInput, match=message):
            simulate(place, who, steps=steps, actions=what)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="positions must be"):
        AgentState.start(torch.zeros(3, 2))
    with pytest.raises(InvalidInput, match="velocities must"):
        AgentState.start(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2)])
def test_nobody_at_all(form: str, shape: tuple[int, int, int]) -> None:
    state = AgentState.start(torch.zeros(shape, device=DEVICE))
    for world in (Boids(), Circles()):
        assert simulate(world, state, steps=2).positions.shape == shape
    assert simulate(Boids(), state, steps=2).steps_done.tolist() == [2] * shape[0]


def test_strided_inputs_and_no_steps(form: str) -> None:
    skip_without_fixed_order(form)
    state = flock(2, 9)
    positions, velocities = state.positions.transpose(0, 1).contiguous().transpose(0, 1), state.velocities.mT.contiguous().mT
    strided = replace(state, positions=positions, velocities=velocities)
    for world in (Boids(), Circles()):
        assert_same(simulate(world, strided, steps=2), simulate(world, state, steps=2))
        assert_same(simulate(world, state, steps=0), state)


def test_float64_is_computed_in_float64() -> None:
    state = flock(2, 20)
    wide = replace(state, positions=state.positions.double(), velocities=state.velocities.double())
    for world in (Boids(), Circles(radius=0.05)):
        ours, theirs = simulate(world, wide, steps=3), reference.simulate(world, wide, steps=3)
        torch.testing.assert_close(ours.positions, theirs.positions, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("index", range(3))
def test_steps_can_be_captured(index: int) -> None:
    world, state = everyone()[index]
    expected = simulate(world, state, steps=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = simulate(world, state, steps=4)
    graph.replay()
    assert_same(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares a device with the CPU")
def test_a_million_circles() -> None:
    state = flock(1, 1 << 20)
    world = Circles(radius=0.4 / 1024)
    ours = simulate(world, state, steps=2, dt=1e-4)
    on_cpu = simulate(world, AgentState.start(state.positions.cpu(), state.velocities.cpu()), steps=2, dt=1e-4)
    torch.testing.assert_close(ours.positions.cpu(), on_cpu.positions, rtol=0, atol=1e-5)
