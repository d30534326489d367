"""Attention: dense against every kernel of SDPA, packed against padded, paged decoding against gathered."""

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases import FLOOR, Case
from penstock.kernels import backends, ops
from penstock.kernels.attention import reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
SDPA_KERNELS = ("cudnn", "flash", "efficient")
Tensors = tuple[torch.Tensor, ...]


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    heads, d = ((32, 8), 128) if is_cuda else ((8, 2), 64)
    lengths = (1024, 8192) if is_cuda else (128, 512)
    for length in lengths[:1] if is_quick else lengths:
        for causal in (False, True):
            yield _dense(4 if is_cuda else 2, length, length, heads, d, causal, dtype, device)
    yield _dense(4 if is_cuda else 2, lengths[-1] // 2, lengths[-1], heads, d, True, dtype, device)
    for num, longest in ((32, 4096), (128, 1024)) if is_cuda else ((16, 256), (8, 512)):
        for causal in (False, True):
            yield _varlen(num // 4 if is_quick else num, longest, heads, d, causal, dtype, device)
    batches = ((64, 4096), (16, 16_384), (1, 65_536)) if is_cuda else ((16, 1024), (64, 128), (1, 4096))
    for batch, context in batches[:1] if is_quick else batches:
        yield _paged(batch, context, heads, d, dtype, None, device)
    yield _paged(*batches[0], heads, d, dtype, torch.int8, device)


def _near(got: torch.Tensor, expected: torch.Tensor, v: torch.Tensor) -> None:
    error, bound = float((got.double() - expected.double()).abs().max()), TOLERANCE[v.dtype] * float(v.abs().max())
    assert error <= bound, f"off by {error:g}, allowed {bound:g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(
    batch: int, queries: int, keys: int, heads: tuple[int, int], d: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    q, k, v = (
        torch.randn(batch, h, n, d, device=device).to(dtype)
        for h, n in ((heads[0], queries), (heads[1], keys), (heads[1], keys))
    )

    def ours() -> torch.Tensor:
        return ops.attention(q, k, v, causal=causal)

    def forced(name: str) -> torch.Tensor:
        with backends.forced(name):
            return ours()

    def check() -> None:
        rows = slice(queries - min(queries, 64), queries)  # the last ones, which causal aligns with the last keys
        few = q[:1, :, rows], k[:1], v[:1]
        _near(ours()[:1, :, rows], reference.attention(*few, causal=causal), v)

    mask = None
    if causal and queries != keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    peers: dict[str, Callable[[], Any]] = {
        "torch": lambda: scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True
        )
    }
    if device.type == "cuda":
        peers |= {name: lambda name=name: forced(name) for name in SDPA_KERNELS if _runs(lambda name=name: forced(name))}
    seen = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return Case(
        "attention", f"B={batch} H={heads[0]}/{heads[1]} L={queries}x{keys} D={d}{' causal' * causal} {_name(dtype)}",
        ours, check, peers, q.nbytes * 2 + k.nbytes * 2, 4.0 * batch * heads[0] * d * seen, _name(dtype),
        dict.fromkeys(peers, 0.98 if device.type == "cuda" else 0.95),
    )  # fmt: skip


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except backends.BackendError:
        return False
    return True


def _varlen(
    num: int, longest: int, heads: tuple[int, int], d: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    """Lengths evenly from a quarter of the longest to the longest, shuffled."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(longest / 4, longest, num).int()[order]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).to(device)
    total = int(lengths.sum())
    q, k, v = (torch.randn(total, h, d, device=device).to(dtype) for h in (heads[0], heads[1], heads[1]))

    def ours() -> torch.Tensor:
        return ops.attention_varlen(q, k, v, bounds, causal=causal, max_seqlen_q=longest, max_seqlen_k=longest)

    def check() -> None:
        end = int(bounds[2])
        _near(ours()[:end], reference.attention_varlen(q[:end], k[:end], v[:end], bounds[:3], causal=causal), v)

    padded = [
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths.tolist())), batch_first=True).transpose(1, 2).contiguous()
        for x in (q, k, v)
    ]
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(device)
    if causal:  # behind the end of a sequence only queries that nobody reads see padding
        peers = {"torch padded": lambda: scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True)}
    else:
        peers = {"torch padded": lambda: scaled_dot_product_attention(*padded, attn_mask=mask, enable_gqa=True)}
    squares = sum(n * (n + 1) // 2 if causal else n * n for n in lengths.tolist())
    return Case(
        "attention_varlen",
        f"{num} x {longest // 4}-{longest} H={heads[0]}/{heads[1]} D={d}{' causal' * causal} {_name(dtype)}",
        ours, check, peers, q.nbytes * 2 + k.nbytes * 2, 4.0 * heads[0] * d * squares, _name(dtype),
        {"torch padded": 3.0 if device.type == "cuda" else 0.95},
        can_graph=device.type == "cuda",
    )  # fmt: skip


def _paged(
    batch: int,
    context: int,
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    device: torch.device,
    block_size: int = 16,
) -> Case:
    """Contexts evenly from half of `context` to `context`, in blocks that lie anywhere."""
    lengths = torch.linspace(context / 2 if batch > 1 else context, context, batch).int()
    num_blocks = batch * -(-context // block_size)
    table = torch.randperm(num_blocks).view(batch, -1).int().to(device)
    shape = (num_blocks, block_size, heads[1])
    caches = {f"{x}_cache": torch.zeros(*shape, d, device=device).to(cache_dtype or dtype) for x in "kv"}
    if cache_dtype is not None:
        caches |= {f"{x}_scale": torch.zeros(shape, device=device) for x in "kv"}
    slots = torch.arange(num_blocks * block_size, device=device)
    k, v = (torch.randn(len(slots), heads[1], d, device=device).to(dtype) for _ in range(2))
    ops.write_kv(k, v, slots=slots, **caches)
    largest = v.abs().max()
    q = torch.randn(batch, heads[0], d, device=device).to(dtype)
    given = {"block_table": table, "context_lens": lengths.to(device), **caches}

    def ours() -> torch.Tensor:
        return ops.paged_decode(q, **given)

    def check() -> None:
        rows = {**given, "block_table": table[:1].cpu(), "context_lens": lengths[:1]}
        rows |= {name: x.cpu() for name, x in caches.items()}
        _near(ours()[:1].cpu(), reference.paged_decode(q[:1].cpu(), **rows), largest.cpu())

    peers: dict[str, Callable[[], Any]] = {}
    if cache_dtype is None:
        peers["torch"] = lambda: _gather_and_attend(q, caches, table, given["context_lens"])
        if importlib.util.find_spec("transformers") is not None:
            peers["transformers"] = _transformers(q, caches, table, lengths)
    tokens = int(lengths.sum())
    token_bytes = sum(x[0, 0].nbytes for x in caches.values())
    goals = {"torch": 0.95} if device.type == "cpu" else {FLOOR: 0.8, "transformers": 5.0}
    return Case(
        "paged_decode",
        f"B={batch} context {int(lengths.min())}-{context} H={heads[0]}/{heads[1]} D={d} {_name(cache_dtype or dtype)}",
        ours, check, peers, tokens * token_bytes + 2 * q.nbytes, 4.0 * heads[0] * d * tokens, _name(dtype),
        {name: ratio for name, ratio in goals.items() if name in peers or name == FLOOR},
        can_graph=device.type == "cuda",
    )  # fmt: skip


def _gather_and_attend(
    q: torch.Tensor, caches: dict[str, torch.Tensor], table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    k, v = (caches[name][table.long()].flatten(1, 2).transpose(1, 2) for name in ("k_cache", "v_cache"))
    mask = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]


def _transformers(
    q: torch.Tensor, caches: dict[str, torch.Tensor], table: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], Any]:
    """What `paged|sdpa` does: gathers all contexts into one row of keys, and masks what is another sequence's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    block_size = caches["k_cache"].shape[1]
    index = torch.cat([
        (row.long()[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()[:length]
        for row, length in zip(table, lengths.tolist(), strict=True)
    ])  # fmt: skip
    owner = torch.arange(len(q)).repeat_interleave(lengths).to(q.device)
    is_own = owner == torch.arange(len(q), device=q.device)[:, None]
    mask = torch.where(is_own, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[None, None]  # [1, 1, B, tokens]
    flat = [caches[name].flatten(0, 1) for name in ("k_cache", "v_cache")]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // flat[0].shape[1], is_causal=False, training=False)

    def call() -> Any:
        keys, values = (x[index].transpose(0, 1)[None] for x in flat)
        return sdpa_attention_forward(module, q.transpose(0, 1)[None], keys, values, mask, scaling=q.shape[-1] ** -0.5)[0]

    return call
