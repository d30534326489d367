"""State space scans: a Mamba layer's scan of prompts and its single step, and Mamba-2's scan.

The peer "transformers" is the plain torch form of its layers, in the layout that those use; "torch.compile" is that form
compiled, with the associative scan that it takes when compiled.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernel_cases import FLOOR, Case
from penstock.kernels import ops
from penstock.kernels.scan import reference

EXPS_PER_SECOND = 3.7e12
BYTES_PER_SECOND = 3.0e12
"""An H100's special function units, and its memory's copy bandwidth: exponentials are given as the bytes that take as long."""


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    scans = [(8, 2048, 1536), (1, 4096, 1536), (64, 512, 4096)] if is_cuda else [(1, 512, 256), (4, 128, 768)]
    for batch, length, channels in scans:
        yield _scan(batch, length // 4 if is_quick else length, channels, dtype, device)
    for batch in (1, 64, 512) if is_cuda else (64, 256):
        yield _update(batch, 1536, dtype, device)
    for batch, length, heads in ((8, 2048, 24), (1, 8192, 64)) if is_cuda else ((1, 512, 24), (2, 256, 24)):
        yield _ssd(batch, length // 4 if is_quick else length, heads, dtype, device)


def _scan(batch: int, length: int, channels: int, dtype: torch.dtype, device: torch.device) -> Case:
    u, delta, z = (torch.randn(batch, length, channels, device=device).to(dtype) for _ in range(3))
    B, C = (torch.randn(batch, length, 16, device=device).to(dtype) for _ in range(2))
    A = -torch.arange(1.0, 17, device=device).expand(channels, 16).contiguous()
    D, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)

    def ours() -> Any:
        return ops.selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, return_last_state=True)

    def check() -> None:
        few = slice(0, min(256, length))
        y, _ = ours()
        wanted = reference.selective_scan(
            u[:1, few], delta[:1, few], A, B[:1, few], C[:1, few], D=D, z=z[:1, few], delta_bias=bias
        )
        torch.testing.assert_close(y[:1, few], wanted, **_tolerance(dtype))

    lines = [part.mT.contiguous() for part in (u, delta, B, C, z)]  # time last, as those layers have it
    ut, deltat, Bt, Ct, zt = lines
    peers: dict[str, Callable[[], Any]] = {}
    if theirs := _found("transformers.models.mamba.modeling_mamba", "mamba_selective_scan"):

        def plain(**how: Any) -> Any:
            return theirs(ut, deltat, A, Bt, Ct, D=D, z=zt, delta_bias=bias, delta_softplus=True, return_last_state=True, **how)

        peers["transformers"] = plain
        if device.type == "cuda":
            compiled = torch.compile(plain)
            peers["torch.compile"] = lambda: compiled(use_associative_scan=True)
    if fused := _found("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"):
        peers["mamba_ssm"] = lambda: fused(ut, deltat, A, Bt, Ct, D, zt, bias, True, True)
    # Either what crosses the memory or one exponential for each entry of each step's state, whichever takes longer.
    num_bytes = 4 * u.nbytes + B.nbytes + C.nbytes
    num_exps = batch * length * channels * 16
    goals = {"transformers": 10.0, "torch.compile": 10.0, "mamba_ssm": 1.0, FLOOR: 0.6}
    return Case(
        "selective_scan", f"B={batch} L={length} D={channels} N=16 {_name(dtype)}", ours, check, peers,
        max(num_bytes, num_exps / EXPS_PER_SECOND * BYTES_PER_SECOND) if device.type == "cuda" else num_bytes,
        goals=goals if device.type == "cuda" else {"transformers": 0.95},
    )  # fmt: skip


def _update(batch: int, channels: int, dtype: torch.dtype, device: torch.device) -> Case:
    u, delta, z = (torch.randn(batch, channels, device=device).to(dtype) for _ in range(3))
    B, C = (torch.randn(batch, 16, device=device).to(dtype) for _ in range(2))
    A = -torch.arange(1.0, 17, device=device).expand(channels, 16).contiguous()
    D, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)
    state = torch.zeros(batch, channels, 16, device=device)

    def ours() -> Any:
        return ops.selective_state_update(state, u, delta, A, B, C, D=D, z=z, delta_bias=bias)

    def check() -> None:
        state.normal_()
        expected = state.clone()
        wanted = reference.selective_state_update(expected, u, delta, A, B, C, D=D, z=z, delta_bias=bias)
        torch.testing.assert_close(ours(), wanted, **_tolerance(dtype))
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)

    peers: dict[str, Callable[[], Any]] = {}
    theirs = _found("transformers.models.mamba.modeling_mamba", "mamba_selective_state_update")
    if theirs:
        peers["transformers"] = lambda: theirs(state, u, delta, A, B, C, D, bias, True, z)
    if fused := _found("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"):
        peers["mamba_ssm"] = lambda: fused(state, u, delta, A, B, C, D, z, bias, True)
    return Case(
        "selective_state_update", f"B={batch} D={channels} N=16 {_name(dtype)}", ours, check, peers,
        2 * state.nbytes + 4 * u.nbytes + A.nbytes,
        goals={"transformers": 3.0, "mamba_ssm": 1.0} if device.type == "cuda" else {"transformers": 0.95},
    )  # fmt: skip


def _ssd(batch: int, length: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    head_dim, state, chunk = 64, 128, 64
    x = torch.randn(batch, length, heads, head_dim, device=device).to(dtype)
    delta = torch.randn(batch, length, heads, device=device).to(dtype)
    B, C = (torch.randn(batch, length, 1, state, device=device).to(dtype) for _ in range(2))
    A = -torch.linspace(1, 16, heads, device=device)
    D, bias = torch.ones(heads, device=device), torch.full((heads,), -4.0, device=device)

    def ours() -> Any:
        return ops.ssd(
            x, delta, A, B, C, chunk_size=chunk, D=D, delta_bias=bias, delta_softplus=True, return_last_state=True
        )

    def check() -> None:
        few = slice(0, min(256, length))
        y, _ = ours()
        wanted = reference.ssd(
            x[:1, few], delta[:1, few], A, B[:1, few], C[:1, few], D=D, delta_bias=bias, delta_softplus=True
        )
        torch.testing.assert_close(y[:1, few], wanted, **_tolerance(dtype))

    peers: dict[str, Callable[[], Any]] = {}
    if theirs := _found("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan"):

        def plain() -> Any:
            return theirs(x, delta, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True)

        peers["transformers"] = plain
        if device.type == "cuda":
            peers["torch.compile"] = torch.compile(plain)
    if fused := _found("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"):
        peers["mamba_ssm"] = lambda: fused(
            x, delta, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
        )
    # Per step and head: a row of scores over half a chunk, and both products with the state; all in float32.
    num_flops = 2.0 * batch * length * heads * (chunk / 2 * head_dim + 2 * head_dim * state)
    return Case(
        "ssd", f"B={batch} L={length} H={heads} P=64 N=128 {_name(dtype)}", ours, check, peers,
        2 * x.nbytes + delta.nbytes + B.nbytes + C.nbytes, num_flops,
        goals={"transformers": 3.0 if device.type == "cuda" else 0.95},
    )  # fmt: skip


def _found(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 2e-2}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
