"""Mamba-2's scan as matrix products: within chunks like masked attention, between chunks by their states.

Knows float32 arithmetic; shapes were checked before. Source: Dao and Gu 2024, section 6 and listing 1. Letters below:
b batch, c chunk, t and s positions in a chunk, g group, r heads of a group, h = g r, p head_dim, n state.
"""

import math

import torch
import torch.nn.functional as F

SPAN_ELEMENTS = {"cpu": 1 << 22}  # 16 MiB stays in the outer cache
MAX_SPAN_ELEMENTS = 1 << 26
"""Decays between positions, or entries of the chunks' states, held at once: chunks beyond them have their turn later."""


def ssd(
    x: torch.Tensor, sizes: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y without skip and gate, last state), both float32. sizes: float32 `[batch, length, heads]`, A: `[batch, heads]`.

    state: float32 `[batch, heads, head_dim, state]`, the initial one. Not written to.
    """
    batch, length, heads, head_dim = x.shape
    pairs = max(batch * heads, 1)
    limit = SPAN_ELEMENTS.get(x.device.type, MAX_SPAN_ELEMENTS)
    chunk = max(min(chunk, length, math.isqrt(limit // pairs)), 1)
    span = chunk * max(limit // (pairs * max(chunk * chunk, head_dim * B.shape[3])), 1)
    y = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    for start in range(0, length, span):
        part = slice(start, min(start + span, length))
        padding = -(part.stop - start) % chunk
        padded = [_padded(whole[:, part].float(), padding) for whole in (x, sizes, B, C)]
        out, state = _span(padded[0], padded[1], A, padded[2], padded[3], chunk, state)
        y[:, part] = out[:, : part.stop - start]
    return y, state


def _padded(part: torch.Tensor, padding: int) -> torch.Tensor:
    """Steps of size 0 change no state."""
    return F.pad(part, (0, 0) * (part.ndim - 2) + (0, padding)) if padding else part


def _span(
    x: torch.Tensor, sizes: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state) of whole chunks."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, r, t = length // chunk, h // g, chunk
    drive = (x * sizes.unsqueeze(3)).view(b, c, t, h, p).transpose(2, 3)  # b c h t p
    B, C = (part.reshape(b, c, t, g, n).transpose(2, 3) for part in (B, C))  # b c g t n
    between, from_start, to_end = _decays((sizes * A.unsqueeze(1)).view(b, c, t, h).transpose(2, 3))

    scores = between.view(b, c, g, r, t, t).mul_((C @ B.mT).unsqueeze(3)).view(b, c, h, t, t)
    y = scores @ drive  # b c h t p
    added = (drive * to_end.unsqueeze(4)).mT.reshape(b, c, g, r * p, t) @ B  # b c g (r p) n
    before, state = _carried(added.view(b, c, h, p, n), from_start[..., -1], state)
    carried = C @ before.view(b, c, g, r * p, n).mT  # b c g t (r p)
    y.addcmul_(carried.view(b, c, g, t, r, p).transpose(3, 4).reshape(b, c, h, t, p), from_start.unsqueeze(4))
    return y.transpose(2, 3).reshape(b, length, h, p), state


def _decays(exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Between two positions `[..., t, s]` (0 where s > t), from the chunk's start `[..., t]`, to its end `[..., t]`.

    Differences of running sums, in float64: after one strong step the sums are large, and in float32 the weak steps
    behind it would be lost in them.
    """
    wide = torch.float32 if exponents.device.type == "mps" else torch.float64  # Apple's devices have no other
    sums = exponents.cumsum(-1, dtype=wide)
    size = exponents.shape[-1]
    between = exponents.new_empty(*exponents.shape, size)
    torch.sub(sums.unsqueeze(-1), sums.unsqueeze(-2), out=between)
    future = torch.ones(size, size, dtype=torch.bool, device=exponents.device).triu_(1)
    between.masked_fill_(future, -torch.inf).exp_()
    return between, sums.float().exp_(), (sums[..., -1:] - sums).float().exp_()


def _carried(added: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the state before each chunk, that after the last). added: `[b, c, h, p, n]`, decay: `[b, c, h]`."""
    before = torch.empty_like(added)
    for chunk in range(added.shape[1]):
        before[:, chunk] = state
        state = torch.addcmul(added[:, chunk], decay[:, chunk, :, None, None], state)
    return before, state
