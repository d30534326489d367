"""`space.py` and `noise.py` for blocks in Triton.

Knows the same formulas, bit for bit in the case of the hash; does not know who calls.
"""
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def wrapped(d, size):
    """The difference to the nearest image; d lies between -size and size."""
    half = 0.5 * size
    return tl.where(d > half, d - size, tl.where(d < -half, d + size, d))


@triton.jit
def bounded(x, v, size, margin, HAS_WALLS: tl.constexpr):
    """One coordinate and its velocity, brought back into the square."""
    if HAS_WALLS:
        high = size - margin
        v = tl.where(x < margin, tl.abs(v), tl.where(x > high, -tl.abs(v), v))
        x = tl.where(x < margin, 2 * margin - x, x)
        x = tl.where(x > high, 2 * high - x, x)
        x = tl.where(x < margin, margin, x)
        x = tl.where(x > high, high, x)
    else:
        x = x - size * tl.floor(x / size)
        x = tl.where(x < 0, x + size, x)
        x = tl.where(x >= size, 0.0, x)
    return x, v


@triton.jit
def mix(x):
    """`noise._mix` of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def uniform(now, counter):
    """Uniform in [-1, 1) from a world's key of this step and a counter, both uint32."""
    bits = mix(now ^ mix(counter)) >> 8
    return bits.to(tl.float32) * 1.1920928955078125e-07 - 1.0
