# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped"
"""The selective scan as one Triton kernel: states in registers, serial over time, channels side by side.

Knows tensors on one device; shapes were checked before. A program holds the states of 32 channels of one sequence, a
channel per lane, and walks through time in tiles of 8 steps: what a lane needs of a tile is in its own registers, and
channels are read in one line. Where that makes too few programs, the sequence is cut into chunks, in three passes: each
chunk alone from a state of zero (its last state and its total step), a walk over the chunks' states, and each chunk
again from the state that it really starts with. That computes the exponentials twice. Source: Gu and Dao 2023, 3.3.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from penstock.kernels import backends
from penstock.kernels.scan.stepped import shared_once

LANES = 32
STATES_PER_WARP = 16
TILE_STEPS = 8
MAX_STATE = 256
MIN_CHUNK_STEPS = 64
WARPS_PER_PROCESSOR = 8
"""Two for each of a multiprocessor's four schedulers: what hides the latency of a serial chain."""

LOG2_E = tl.constexpr(1.4426950408889634)
_VARYING = ["length", "span", "stride_ut", "stride_dt", "stride_zt", "stride_yt"]
"""Left unspecialized: a stride known to be a multiple of 16 would spread a tile's rows over lanes, for wide loads."""


@triton.jit
def _softplus(x):
    # max(x, 0) + log1p(w), where log(s) w / (s - 1) is log1p(w) without the rounding of s = 1 + w.
    w = tl.exp(-tl.abs(x))
    s = 1.0 + w
    return tl.maximum(x, 0.0) + tl.where(s == 1.0, w, tl.log(s) * (w / tl.where(s == 1.0, 1.0, s - 1.0)))


@triton.jit
def _silu(x):
    w = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, x * w, x) / (1.0 + w)


@triton.jit
def _row(tile, rows, row: tl.constexpr):
    # -0.0 is what addition leaves alone: the sum is no instruction at all, the tile's rows being registers.
    return tl.sum(tl.where(rows == row, tile, -0.0), 0)


@triton.jit(do_not_specialize=_VARYING)
def _scan(
    u, delta, A, B, C, D, z, delta_bias, start, y, last, total, length, channels, num_chunks, span,
    stride_ub, stride_ut, stride_db, stride_dt, stride_zb, stride_zt, stride_yb, stride_yt, stride_Bb, stride_Bt,
    stride_Cb, stride_Ct, stride_Ab, stride_Db, stride_biasb,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    # One chunk of one block of channels. `y` None: only the last state and the total step are wanted.
    num_blocks = tl.cdiv(channels, BLOCK_D)
    sequence = (tl.program_id(0) // num_blocks).to(tl.int64)  # batch * num_chunks + chunk
    batch, first = sequence // num_chunks, (sequence % num_chunks) * span
    ds = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    ns = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, STEPS)[:, None]
    is_d = ds < channels
    is_nd = (ns < N)[:, None] & is_d[None, :]
    at_nd = (sequence * N + ns[:, None]) * channels + ds[None, :]

    rate = tl.load(A + batch * stride_Ab + ns[:, None] * channels + ds[None, :], mask=is_nd, other=0.0) * LOG2_E
    bias = 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + batch * stride_biasb + ds, mask=is_d, other=0.0)[None, :]
    if D is not None:
        skip = tl.load(D + batch * stride_Db + ds, mask=is_d, other=0.0)[None, :]
    x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if start is not None:
        x = tl.load(start + at_nd, mask=is_nd, other=0.0)
    stepped = tl.zeros([BLOCK_D], tl.float32)

    count = tl.minimum(length - first, span).to(tl.int32)
    u += batch * stride_ub + first * stride_ut
    delta += batch * stride_db + first * stride_dt
    B += batch * stride_Bb + first * stride_Bt
    at_u = rows * stride_ut + ds[None, :]
    at_delta = rows * stride_dt + ds[None, :]
    if y is not None:
        C += batch * stride_Cb + first * stride_Ct
        y += batch * stride_yb + first * stride_yt
        at_y = rows * stride_yt + ds[None, :]
    if z is not None:
        z += batch * stride_zb + first * stride_zt
        at_z = rows * stride_zt + ds[None, :]

    is_in = (rows < count) & is_d[None, :]
    next_u = tl.load(u + at_u, mask=is_in, other=0.0)  # always one tile ahead: memory is slower than a tile of steps
    next_delta = tl.load(delta + at_delta, mask=is_in, other=0.0)
    for done in range(0, count, STEPS):
        left = count - done
        values, sizes = next_u.to(tl.float32), next_delta.to(tl.float32) + bias
        u += STEPS * stride_ut
        delta += STEPS * stride_dt
        is_next = (rows < left - STEPS) & is_d[None, :]
        next_u = tl.load(u + at_u, mask=is_next, other=0.0)
        next_delta = tl.load(delta + at_delta, mask=is_next, other=0.0)
        is_in = (rows < left) & is_d[None, :]
        if z is not None:
            gate = tl.load(z + at_z, mask=is_in, other=0.0)
        if SOFTPLUS:
            sizes = _softplus(sizes)
        sizes = tl.where(is_in, sizes, 0.0)  # beyond the end nothing decays and nothing comes in
        drive = sizes * values
        if y is not None:
            out = tl.zeros([STEPS, BLOCK_D], tl.float32)
        else:
            stepped += tl.sum(sizes, 0)
        for step in tl.static_range(STEPS):
            row = tl.minimum(step, left - 1)  # a row that exists costs less than a mask, and its size is 0
            into = tl.load(B + row * stride_Bt + ns, mask=ns < N, other=0.0).to(tl.float32)
            decay = tl.exp2(_row(sizes, rows, step)[None, :] * rate)
            x = decay * x + into[:, None] * _row(drive, rows, step)[None, :]
            if y is not None:
                outof = tl.load(C + row * stride_Ct + ns, mask=ns < N, other=0.0).to(tl.float32)
                out = tl.where(rows == step, tl.sum(x * outof[:, None], 0)[None, :], out)
        if y is not None:
            if D is not None:
                out += skip * values
            if z is not None:
                out *= _silu(gate.to(tl.float32))
                z += STEPS * stride_zt
            tl.store(y + at_y, out.to(y.dtype.element_ty), mask=is_in)
            C += STEPS * stride_Ct
            y += STEPS * stride_yt
        B += STEPS * stride_Bt
    if last is not None:
        tl.store(last + at_nd, x, mask=is_nd)
    if total is not None:
        tl.store(total + sequence * channels + ds, stepped, mask=is_d)


@triton.jit
def _carry(
    ends, total, A, start, starts, last, channels, num_chunks, stride_Ab,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # From each chunk's own last state: the state that it starts with. Not in place: warps do not wait for each other.
    num_blocks = tl.cdiv(channels, BLOCK_D)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    ds = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    ns = tl.arange(0, BLOCK_N)
    is_d = ds < channels
    is_nd = (ns < N)[:, None] & is_d[None, :]
    at = ns[:, None] * channels + ds[None, :]
    rate = tl.load(A + batch * stride_Ab + at, mask=is_nd, other=0.0) * LOG2_E
    x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if start is not None:
        x = tl.load(start + batch * N * channels + at, mask=is_nd, other=0.0)
    for chunk in range(num_chunks):
        sequence = batch * num_chunks + chunk
        own = tl.load(ends + sequence * N * channels + at, mask=is_nd, other=0.0)
        size = tl.load(total + sequence * channels + ds, mask=is_d, other=0.0)
        tl.store(starts + sequence * N * channels + at, x, mask=is_nd)
        x = tl.exp2(size[None, :] * rate) * x + own
    tl.store(last + batch * N * channels + at, x, mask=is_nd)


@triton.jit
def _update(
    state, u, delta, A, B, C, D, z, delta_bias, y, channels,
    stride_sb, stride_sd, stride_sn, stride_Ab, stride_Db, stride_biasb,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(channels, BLOCK_D)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    ds = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    ns = tl.arange(0, BLOCK_N)
    is_d, is_n = ds < channels, ns < N
    is_dn = is_d[:, None] & is_n[None, :]
    at_d = batch * channels + ds
    values = tl.load(u + at_d, mask=is_d, other=0.0).to(tl.float32)
    size = tl.load(delta + at_d, mask=is_d, other=0.0).to(tl.float32)
    if delta_bias is not None:
        size += tl.load(delta_bias + batch * stride_biasb + ds, mask=is_d, other=0.0)
    if SOFTPLUS:
        size = _softplus(size)
    rate = tl.load(A + batch * stride_Ab + ds[:, None] * N + ns[None, :], mask=is_dn, other=0.0) * LOG2_E
    into = tl.load(B + batch * N + ns, mask=is_n, other=0.0).to(tl.float32)
    outof = tl.load(C + batch * N + ns, mask=is_n, other=0.0).to(tl.float32)
    at = state + batch * stride_sb + ds[:, None] * stride_sd + ns[None, :] * stride_sn
    x = tl.load(at, mask=is_dn, other=0.0)
    x = tl.exp2(size[:, None] * rate) * x + (size * values)[:, None] * into[None, :]
    tl.store(at, x, mask=is_dn)
    out = tl.sum(x * outof[None, :], 1)
    if D is not None:
        out += tl.load(D + batch * stride_Db + ds, mask=is_d, other=0.0) * values
    if z is not None:
        gate = tl.load(z + at_d, mask=is_d, other=0.0).to(tl.float32)
        out *= _silu(gate)
    tl.store(y + at_d, out.to(y.dtype.element_ty), mask=is_d)


@cache
def _num_processors(device: torch.device) -> int:
    return 1 if backends.is_interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def num_chunks_for(length: int, num_warps: int, num_processors: int) -> int:
    """Into how many chunks a sequence is cut, given how many warps there are without.

    1 unless that at least triples them, since chunks compute everything twice; each is 64 steps or more.
    """
    chunks = min(WARPS_PER_PROCESSOR * num_processors // num_warps, length // MIN_CHUNK_STEPS)
    return chunks if chunks >= 3 else 1


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    initial_state: torch.Tensor | None,
    num_chunks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `stepped.selective_scan`, with something in every dimension. num_chunks: None for as many as fill the device."""
    batch, length, channels = u.shape
    num_states = A.shape[2]
    u, delta, B, C = (_lines(part) for part in (u, delta, B, C))
    z = None if z is None else _lines(z)
    A = shared_once(A.transpose(1, 2))  # [batch, state, channels], as the states here: channels are in one line
    start = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty(batch, num_states, channels, dtype=torch.float32, device=u.device)
    block_n = triton.next_power_of_2(num_states)
    sizes = {"N": num_states, "BLOCK_N": block_n, "BLOCK_D": LANES}
    num_warps = max(block_n // STATES_PER_WARP, 1)
    num_programs = batch * triton.cdiv(channels, LANES)
    if num_chunks is None:
        num_chunks = num_chunks_for(length, num_programs * num_warps, _num_processors(u.device))
    span = triton.cdiv(triton.cdiv(length, num_chunks), TILE_STEPS) * TILE_STEPS
    num_chunks = triton.cdiv(length, span)

    def scan(start, y, last, total, chunks, span) -> None:
        _scan[(num_programs * chunks,)](
            u, delta, A, B, C, D, z, delta_bias, start, y, last, total, length, channels, chunks, span,
            *u.stride()[:2], *delta.stride()[:2], *((0, 0) if z is None else z.stride()[:2]),
            *((0, 0) if y is None else y.stride()[:2]), *B.stride()[:2], *C.stride()[:2], A.stride(0),
            0 if D is None else D.stride(0), 0 if delta_bias is None else delta_bias.stride(0),
            **sizes, STEPS=TILE_STEPS, SOFTPLUS=delta_softplus, num_warps=num_warps,
        )  # fmt: skip

    if num_chunks == 1:
        scan(start, y, last, None, 1, span)
        return y, last.transpose(1, 2)
    ends, starts = torch.empty(2, batch, num_chunks, num_states, channels, dtype=torch.float32, device=u.device)
    total = torch.empty(batch, num_chunks, channels, dtype=torch.float32, device=u.device)
    scan(None, None, ends, total, num_chunks, span)
    _carry[(num_programs,)](
        ends, total, A, start, starts, last, channels, num_chunks, A.stride(0), **sizes, num_warps=num_warps
    )
    scan(starts, y, None, None, num_chunks, span)
    return y, last.transpose(1, 2)


def selective_state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> torch.Tensor:
    """As `stepped.selective_state_update`, with something in every dimension."""
    batch, channels, num_states = state.shape
    u, delta, B, C = (part.contiguous() for part in (u, delta, B, C))
    z = None if z is None else z.contiguous()
    A = shared_once(A)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    block_n = triton.next_power_of_2(num_states)
    block_d = max(1024 // block_n, 4)
    _update[(batch * triton.cdiv(channels, block_d),)](
        state, u, delta, A, B, C, D, z, delta_bias, y, channels, *state.stride(), A.stride(0),
        0 if D is None else D.stride(0), 0 if delta_bias is None else delta_bias.stride(0),
        N=num_states, BLOCK_N=block_n, BLOCK_D=block_d, SOFTPLUS=delta_softplus, num_warps=4,
    )  # fmt: skip
    return y


def _lines(part: torch.Tensor) -> torch.Tensor:
    """`part` with its last dimension in one line; batch and time may have any strides."""
    return part if part.stride(-1) == 1 else part.contiguous()
