"""What the kernels and the device runtime are to reach on a GPU, as data: so that the page of results shows every goal, also
those that no run has measured yet."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """`text`: what is to be shown; `op`: the operation of `scripts/bench kernels` that measures it, or how it is measured."""

    text: str
    op: str


KERNELS = (
    Goal("token batch: 85 % of the floor, 2x eager", "token_transform"),
    Goal("sampling: 3x transformers' warpers and multinomial at B=64, V=128k", "sample"),
    Goal("attention, dense: within 2 % of the best backend", "attention"),
    Goal("attention, varlen: 3x padded SDPA at a fourfold spread of lengths", "attention_varlen"),
    Goal("paged decode: 80 % of the floor from 64k tokens of context, 5x transformers' paged SDPA", "paged_decode"),
    Goal("selective scan: 60 % of the floor, 10x transformers' compiled scan, 1.0x mamba-ssm", "selective_scan"),
    Goal("SSD: 3x transformers' torch path", "ssd"),
    Goal("batched GEMM: equal to torch", "matmul"),
    Goal("softmax: equal to torch", "softmax"),
    Goal("MoE: 80 % of the floor to 64 tokens, 55 % from 1k", "moe"),
    Goal("expert offload: 85 % of PCIe on misses, 2x naive copies, hit path within 3 % of resident", "moe_offloaded"),
    Goal("similarity search: 60 % of the floor, 2x sentence-transformers", "similarity_topk"),
    Goal("data: 70 % of the floor, 10x Polars on resident data", "aggregate"),
    Goal("simulation: 10x VMAS-style torch for many worlds, 1M circles within 2.1 ms a step", "simulate"),
    Goal("weight-only int8 / int4: 1.7x / 2.8x bfloat16 at batch 1", "quantized_linear"),
    Goal("speculative verify: under 3 % of a decode step", "speculative_verify"),
)

RUNTIME = (
    Goal("zero allocations after warm-up, memory flat over 1e5 tasks", "tests -m gpu"),
    Goal("at least 90 % of the shorter of copy and compute hidden", "tests -m gpu"),
    Goal("h2d from shared memory at 95 % of the pinned rate", "tests -m gpu"),
    Goal("busy at least 95 % at saturation", "tests -m gpu"),
    Goal("1,000 tasks/s and under 50 ms at batch 32 to 128 for an embedding-size kernel", "tests -m gpu"),
    Goal("illegal access, out of memory and a hanging kernel survived", "tests -m gpu"),
)
