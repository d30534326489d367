"""`simulate`: any world, many steps, by the best form that there is for the device.

Knows which form runs and checks shapes; does not know a world's formulas.
"""

from types import ModuleType

import torch

from penstock.kernels import backends
from penstock.kernels.errors import InvalidInput
from penstock.kernels.simulate import boids, circles, grid
from penstock.kernels.simulate.worlds import AgentState, Boids, GridWorld, Number, World, per_world

MAX_STEPS = 1_000_000


def simulate(
    world: World, state: AgentState, *, steps: int, dt: Number = 0.02, actions: torch.Tensor | None = None
) -> AgentState:
    """The state after `steps` steps of `dt`; the given one is not changed.

    world: `Boids`, `Circles` or `GridWorld`. state: `AgentState.start(positions)`, positions `[worlds, agents, 2]` in float32
    or float64, in a `GridWorld` int32; inside the world, and in a `GridWorld` no two on one cell: that is not looked at
    here. steps: 0 to 1,000,000. dt: a number or `[worlds]`; a `GridWorld` has none. actions: integers `[steps, worlds,
    agents]`, in a `GridWorld` only, in place of what its policy says (its walls stay).

    Worlds do not see each other, and no bit of one depends on which others are there; a + b steps are a steps, then b, bit
    for bit (on the CPU, and with Triton; on other devices torch sums in no fixed order). With Triton, for float32 on cuda,
    nothing waits for the device, and the steps can be captured into a CUDA graph. Tolerance: a step of
    `reference.simulate` in float32, within 1e-5 of the size for positions and 1e-5 of the largest speed or change of it
    for velocities; equal in a `GridWorld`. Over many steps flocks and collisions are chaotic. Raises InvalidInput for
    shapes and dtypes that do not fit.
    """
    _check(world, state, steps, actions)
    form = _form(world, state)
    done = state.steps_done + steps
    if not steps or not state.positions.numel():
        return AgentState(state.positions, state.velocities, done, state.seeds, state.rewards)
    agents, positions, velocities = world.per_agent(state), state.positions.contiguous(), state.velocities.contiguous()
    if isinstance(world, GridWorld):
        moved = form.advance(positions, state.rewards, agents, world.policy, state.steps_done, actions, steps=steps)
        return AgentState(moved[0], moved[1], done, state.seeds, moved[2])
    where = (positions, velocities, agents, per_world(state, world.size), per_world(state, dt))
    if isinstance(world, Boids):
        positions, velocities = form.advance(*where, state.steps_done, state.seeds, steps=steps, has_walls=world.has_walls)
    else:
        springs = (per_world(state, world.stiffness), per_world(state, world.damping))
        positions, velocities = form.advance(
            *where, *springs, steps=steps, has_walls=world.has_walls, max_cells=world.max_cells
        )
    return AgentState(positions, velocities, done, state.seeds)


def _form(world: World, state: AgentState) -> ModuleType:
    """The module whose `advance` runs."""
    name = type(world).__name__.lower()
    device, is_wide = state.positions.device, state.positions.dtype == torch.float64
    usable = ["torch"] if is_wide else backends.torch_or_triton(device)
    if backends.choose(f"simulate.{name}", device, usable) == "torch":
        return {"boids": boids, "circles": circles, "gridworld": grid}[name]
    from penstock.kernels.simulate import boids_triton, circles_triton, grid_triton

    return {"boids": boids_triton, "circles": circles_triton, "gridworld": grid_triton}[name]


def _check(world: World, state: AgentState, steps: int, actions: torch.Tensor | None) -> None:
    is_grid, dtype = isinstance(world, GridWorld), state.positions.dtype
    if type(steps) is not int or not 0 <= steps <= MAX_STEPS:
        raise InvalidInput(f"simulate: steps must be an integer from 0 to {MAX_STEPS}; got {steps!r}")
    if dtype not in ((torch.int32,) if is_grid else (torch.float32, torch.float64)):
        wanted = "int32" if is_grid else "float32 or float64"
        raise InvalidInput(f"simulate: positions in {type(world).__name__} must be {wanted}, not {dtype}")
    if isinstance(world, GridWorld):
        shape, num_worlds = world.policy.shape, len(state.positions)
        if len(shape) != 4 or shape[0] not in (1, num_worlds) or not world.policy.numel() or world.policy.dtype != torch.int8:
            raise InvalidInput(
                f"simulate: policy must be int8 [1 or {num_worlds}, layers, height, width] and not empty; "
                f"got {world.policy.dtype} {list(shape)}"
            )
        if state.rewards is None or state.rewards.shape != state.positions.shape:
            raise InvalidInput("simulate: the state of a GridWorld has rewards; make it with AgentState.start")
    if actions is not None and (not is_grid or actions.shape != (steps, *state.positions.shape[:2])):
        raise InvalidInput("simulate: actions are [steps, worlds, agents] and for a GridWorld")
