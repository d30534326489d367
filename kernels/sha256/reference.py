"""SHA-256 as FIPS 180-4 writes it down: plain integers, one block at a time."""

import math
import struct
from collections.abc import Iterator
from itertools import count, islice

import torch

WORD = 0xFFFFFFFF


def sha256(data: list[bytes]) -> torch.Tensor:
    """The digest of each byte string: uint8 `[batch, 32]`."""
    return torch.tensor([list(_digest(item)) for item in data], dtype=torch.uint8).reshape(-1, 32)


def _digest(message: bytes) -> bytes:
    state = [_root_bits(prime, 2) for prime in islice(_primes(), 8)]
    padded = message + b"\x80" + bytes((55 - len(message)) % 64) + struct.pack(">Q", 8 * len(message))
    for start in range(0, len(padded), 64):
        state = _compress(state, padded[start : start + 64])
    return struct.pack(">8I", *state)


def _compress(state: list[int], block: bytes) -> list[int]:
    words = list(struct.unpack(">16I", block))
    for t in range(16, 64):
        s0 = _rotate(words[t - 15], 7) ^ _rotate(words[t - 15], 18) ^ (words[t - 15] >> 3)
        s1 = _rotate(words[t - 2], 17) ^ _rotate(words[t - 2], 19) ^ (words[t - 2] >> 10)
        words.append((words[t - 16] + s0 + words[t - 7] + s1) & WORD)
    a, b, c, d, e, f, g, h = state
    for constant, word in zip((_root_bits(prime, 3) for prime in islice(_primes(), 64)), words, strict=True):
        sum1 = _rotate(e, 6) ^ _rotate(e, 11) ^ _rotate(e, 25)
        t1 = h + sum1 + ((e & f) ^ (~e & g)) + constant + word
        sum0 = _rotate(a, 2) ^ _rotate(a, 13) ^ _rotate(a, 22)
        t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c))
        a, b, c, d, e, f, g, h = (t1 + t2) & WORD, a, b, c, (d + t1) & WORD, e, f, g
    return [(old + new) & WORD for old, new in zip(state, (a, b, c, d, e, f, g, h), strict=True)]


def _rotate(word: int, bits: int) -> int:
    return (word >> bits | word << (32 - bits)) & WORD


def _primes() -> Iterator[int]:
    return (n for n in count(2) if all(n % divisor for divisor in range(2, math.isqrt(n) + 1)))


def _root_bits(prime: int, degree: int) -> int:
    """The first 32 bits of the fraction of the square (2) or cube (3) root of `prime`."""
    scaled = prime << (32 * degree)
    root = math.isqrt(scaled) if degree == 2 else round(scaled ** (1 / 3))
    while root**degree > scaled:
        root -= 1
    while (root + 1) ** degree <= scaled:
        root += 1
    return root & WORD
