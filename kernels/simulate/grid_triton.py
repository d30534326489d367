"""The grid world in Triton: one launch writes down who wants to go where, one grants it.

Knows the rule of `grid.py`; entries of cells carry the step, so that nothing is cleared between steps.
"""
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl

_ROWS = 128


@triton.jit
def _move_x(action):
    return (action == 1).to(tl.int32) - (action == 3).to(tl.int32)


@triton.jit
def _move_y(action):
    return (action == 2).to(tl.int32) - (action == 4).to(tl.int32)


@triton.jit(do_not_specialize=["k"])
def _wish(
    positions, agents, policy, actions, cells, wishes, k, num_agents, num_all, num_layers, height, width,
    HAS_ACTIONS: tl.constexpr, IS_SHARED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """wishes: the action wanted, + 8 if the way is free of walls; cells: stamp + the wish if so, else stamp."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_agent = i < num_all
    world = i // num_agents
    x, y = tl.load(positions + 2 * i, is_agent, 0), tl.load(positions + 2 * i + 1, is_agent, 0)
    layer = tl.load(agents + 3 * i + 2, is_agent, 0).to(tl.int64)
    if not IS_SHARED:
        layer += world * num_layers
    if HAS_ACTIONS:
        wish = tl.load(actions + k.to(tl.int64) * num_all + i, is_agent, 0).to(tl.int32)
    else:
        wish = tl.load(policy + (layer * height + y) * width + x, is_agent, 0).to(tl.int32)
    wish = tl.where((wish >= 1) & (wish <= 4), wish, 0)
    to_x, to_y = x + _move_x(wish), y + _move_y(wish)
    is_inside = is_agent & (wish > 0) & (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    is_free = is_inside & (tl.load(policy + (layer * height + to_y) * width + to_x, is_inside, -1) != -1)
    tl.store(cells + (world * height + y) * width + x, 8 * (k + 1) + 1 + tl.where(is_free, wish, 0), is_agent)
    tl.store(wishes + i, wish + tl.where(is_free, 8, 0), is_agent)


@triton.jit(do_not_specialize=["k"])
def _grant(
    positions, moves, rewards, agents, cells, wishes, steps_done, k, num_agents, num_all, height, width, ROWS: tl.constexpr
):
    """Moves the agents, in place: everything that others ask of them is in `cells`."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_agent = i < num_all
    world = i // num_agents
    x, y = tl.load(positions + 2 * i, is_agent, 0), tl.load(positions + 2 * i + 1, is_agent, 0)
    wish = tl.load(wishes + i, is_agent, 0)
    can_move = is_agent & (wish >= 8)
    wish = wish % 8
    to_x, to_y = x + _move_x(wish), y + _move_y(wish)
    stamp = 8 * (k + 1) + 1
    can_move &= tl.load(cells + (world * height + to_y) * width + to_x, can_move, 0) < stamp
    shift = (tl.load(steps_done + world, is_agent, 0) + k) % 4
    turn = (wish + 3 + shift) % 4
    for rival in tl.static_range(1, 5):
        from_x, from_y = to_x, to_y
        if rival == 1:
            from_x -= 1
        elif rival == 2:
            from_y -= 1
        elif rival == 3:
            from_x += 1
        else:
            from_y += 1
        is_inside = can_move & (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        claim = tl.load(cells + (world * height + from_y) * width + from_x, is_inside, 0)
        can_move &= (claim != stamp + rival) | ((rival + 3 + shift) % 4 >= turn)
    move_x, move_y = tl.where(can_move, _move_x(wish), 0), tl.where(can_move, _move_y(wish), 0)
    x, y = x + move_x, y + move_y
    goal_x, goal_y = tl.load(agents + 3 * i, is_agent, 0), tl.load(agents + 3 * i + 1, is_agent, 0)
    arrivals, refusals = tl.load(rewards + 2 * i, is_agent, 0), tl.load(rewards + 2 * i + 1, is_agent, 0)
    tl.store(positions + 2 * i, x, is_agent)
    tl.store(positions + 2 * i + 1, y, is_agent)
    tl.store(moves + 2 * i, move_x, is_agent)
    tl.store(moves + 2 * i + 1, move_y, is_agent)
    tl.store(rewards + 2 * i, arrivals + tl.where(can_move & (x == goal_x) & (y == goal_y), 1, 0), is_agent)
    tl.store(rewards + 2 * i + 1, refusals + tl.where((wish > 0) & ~can_move, 1, 0), is_agent)


def advance(
    positions: torch.Tensor,
    rewards: torch.Tensor,
    agents: torch.Tensor,
    policy: torch.Tensor,
    steps_done: torch.Tensor,
    actions: torch.Tensor | None,
    *,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `grid.advance`; nothing waits for the device."""
    num_worlds, num_agents, _ = positions.shape
    num_policies, num_layers, height, width = policy.shape
    num_all = num_worlds * num_agents
    cells = torch.zeros(num_worlds * height * width, dtype=torch.int32, device=positions.device)
    wishes = torch.empty(num_all, dtype=torch.int32, device=positions.device)
    policy = policy.contiguous()
    actions = None if actions is None else actions.contiguous()
    positions, rewards = (x.clone(memory_format=torch.contiguous_format) for x in (positions, rewards))
    moves = torch.empty_like(positions)
    blocks = (triton.cdiv(num_all, _ROWS),)
    for k in range(steps):
        _wish[blocks](
            positions, agents, policy, policy if actions is None else actions, cells, wishes, k, num_agents, num_all,
            num_layers, height, width, HAS_ACTIONS=actions is not None, IS_SHARED=num_policies == 1, ROWS=_ROWS,
        )  # fmt: skip
        _grant[blocks](
            positions, moves, rewards, agents, cells, wishes, steps_done, k, num_agents, num_all, height, width, ROWS=_ROWS
        )
    return positions, moves, rewards
