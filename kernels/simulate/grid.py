"""The grid world with torch: who stands where and wants to go where, in one array of cells.

Knows one rule (`worlds.GridWorld`); a cell's entry is `stamp * 8 + 1 + wish`, so that those of earlier steps need no clearing.
"""

import torch

from penstock.kernels.simulate.worlds import EAST, MOVES, NORTH, SOUTH, WALL, WEST


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
    """Positions, last moves and rewards, int32 `[worlds, agents, 2]`, after `steps` steps.

    agents: int32 `[worlds, agents, 3]` of `GridWorld.per_agent`; policy: `[1 or worlds, layers, height, width]`; actions:
    `[steps, worlds, agents]`, or None to follow the policy; steps_done: `[worlds]`.
    """
    num_worlds, num_agents, _ = positions.shape
    num_policies, num_layers, height, width = policy.shape
    world = torch.arange(num_worlds, device=positions.device).repeat_interleave(num_agents)
    goal_x, goal_y, layer = agents.view(-1, 3).long().unbind(-1)
    layer = layer + world * num_layers if num_policies > 1 else layer
    policy_row, cell_row = layer * height, world * height  # of each agent's map, and of its world's cells
    cells = torch.zeros(num_worlds * height * width, dtype=torch.int64, device=positions.device)
    policy = policy.reshape(-1)
    actions = None if actions is None else actions.reshape(steps, -1).long()
    shift = steps_done.repeat_interleave(num_agents)
    x, y = positions.reshape(-1, 2).long().unbind(-1)
    arrivals, refusals = rewards.reshape(-1, 2).unbind(-1)
    step_x = step_y = torch.zeros_like(x)
    for k in range(steps):
        wish = policy.index_select(0, (policy_row + y) * width + x).long() if actions is None else actions[k]
        wish = torch.where((wish >= EAST) & (wish <= SOUTH), wish, 0)
        step_x, step_y = (wish == EAST).long() - (wish == WEST).long(), (wish == NORTH).long() - (wish == SOUTH).long()
        to_x, to_y = (x + step_x).clamp(0, width - 1), (y + step_y).clamp(0, height - 1)
        is_inside = (to_x == x + step_x) & (to_y == y + step_y)
        can_move = (wish > 0) & is_inside & (policy.index_select(0, (policy_row + to_y) * width + to_x) != WALL)
        stamp = 8 * (k + 1) + 1
        cells.index_copy_(0, (cell_row + y) * width + x, stamp + wish * can_move)
        can_move &= cells.index_select(0, (cell_row + to_y) * width + to_x) < stamp
        turn = (wish - EAST + shift + k) % 4
        for rival, (move_x, move_y) in MOVES.items():
            from_x, from_y = (to_x - move_x).clamp(0, width - 1), (to_y - move_y).clamp(0, height - 1)
            is_inside = (from_x == to_x - move_x) & (from_y == to_y - move_y)
            is_claim = cells.index_select(0, (cell_row + from_y) * width + from_x) == stamp + rival
            can_move &= ~(is_inside & is_claim & ((rival - EAST + shift + k) % 4 < turn))
        step_x, step_y = step_x * can_move, step_y * can_move
        x, y = x + step_x, y + step_y
        arrivals = arrivals + (can_move & (x == goal_x) & (y == goal_y))
        refusals = refusals + ((wish > 0) & ~can_move)
    stacked = [torch.stack(pair, -1).int().view_as(positions) for pair in ((x, y), (step_x, step_y), (arrivals, refusals))]
    return stacked[0], stacked[1], stacked[2]
