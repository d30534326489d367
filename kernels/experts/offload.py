"""A mixture of experts through an expert store.

Knows which experts a call needs and in what order they are used; the store knows where they are.
"""

import torch

from penstock.kernels import backends
from penstock.kernels import moe as resident
from penstock.kernels.errors import InvalidInput
from penstock.kernels.experts.errors import ExpertMissing, SlotsTooFew
from penstock.kernels.experts.store import ExpertStore


@torch.no_grad()
def moe_offloaded(
    x: torch.Tensor,
    router_w: torch.Tensor,
    store: ExpertStore,
    layer: int,
    *,
    top_k: int,
    renormalize: bool = True,
) -> torch.Tensor:
    """`moe` with the experts of a store's layer, equal to it with the same weights resident, within its tolerance.

    x: `[tokens, hidden]`, router_w: `[experts, hidden]`, of the experts' dtype on the store's device. The host waits once,
    to learn which experts are needed. Those in slots are used first; if more are needed than there are slots, the others
    follow in turns. Experts without a slot may be computed on the CPU meanwhile (`store.cpu_compute`). Raises InvalidInput,
    SlotsTooFew if `top_k` exceeds the slots, ExpertMissing, ExpertFileError, StoreClosed.
    """
    num_experts = store.files.num_experts.get(layer, 0)
    if not num_experts:
        raise ExpertMissing(f"the store has no layer {layer}")
    resident.check_shapes(x, router_w, top_k)
    is_same = x.dtype == store.files.dtype and x.device == store.w_down.device
    if not is_same or router_w.shape != (num_experts, store.files.hidden_size):
        raise InvalidInput(
            f"moe_offloaded: layer {layer} has {num_experts} experts of hidden {store.files.hidden_size}, {store.files.dtype} "
            f"on {store.device}; got x {x.dtype} on {x.device} and router_w {list(router_w.shape)}"
        )
    if top_k > store.num_slots:
        raise SlotsTooFew(f"a token needs {top_k} experts at once; the store has {store.num_slots} slots")
    if not len(x):
        return x.new_empty(x.shape)
    backend = backends.choose("moe_offloaded", x.device, backends.torch_or_triton(x.device))
    weights, experts = resident.route(backend, x, router_w, top_k, renormalize)
    y = x.new_empty(experts.numel(), x.shape[1])
    _fill(backend, y, x, experts, store, layer)
    return resident.combine(backend, y, weights)


def _fill(backend: str, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, store: ExpertStore, layer: int) -> None:
    """Writes every pair's row, as `sorted_gemm.fill` does."""
    on_host = experts.flatten().cpu()
    rows = {expert: count for expert, count in enumerate(torch.bincount(on_host).tolist()) if count}
    on_cpu = store.choose_cpu(layer, rows)
    on_device = store.resident_first(layer, rows.keys() - set(on_cpu))
    turns = [on_device[start : start + store.num_slots] for start in range(0, len(on_device), store.num_slots)]
    for i, turn in enumerate(turns or [[]]):
        with store.acquire(layer, turn) as lease:
            if i == 0:  # while what is missing of the first turn is fetched
                _fill_on_cpu(y, x, on_host, store, layer, on_cpu)
            lease.wait()
            if turn:
                _fill_from_slots(backend, y, x, experts, store, lease.slots)


def _fill_from_slots(
    backend: str, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, store: ExpertStore, slots: dict[int, int]
) -> None:
    place = [slots.get(expert, store.num_slots) for expert in range(max(store.files.num_experts.values()))]
    on_device = torch.tensor(place, dtype=torch.int32, device=x.device)
    resident.fill(backend, y, x, experts, store.w_gate_up, store.w_down, on_device)


def _fill_on_cpu(
    y: torch.Tensor, x: torch.Tensor, on_host: torch.Tensor, store: ExpertStore, layer: int, experts: list[int]
) -> None:
    top_k = len(on_host) // len(x)
    for expert in experts:
        pairs = (on_host == expert).nonzero()[:, 0]
        rows = x[(pairs // top_k).to(x.device)].cpu()
        y[pairs.to(y.device)] = store.compute_on_cpu(layer, expert, rows).to(y.device)
