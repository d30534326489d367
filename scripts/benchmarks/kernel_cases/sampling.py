"""Sampling against transformers' warpers and torch.multinomial; verification against the same in plain torch."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernel_cases import Case
from penstock.kernels import ops
from penstock.kernels.sampling import reference

PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def cases(device: torch.device, is_quick: bool) -> Iterator[Case]:
    is_cuda = device.type == "cuda"
    sizes = [(64, 131_072), (1, 131_072)] if is_cuda else [(4, 131_072), (32, 32_000)]
    for batch, vocab in sizes[:1] if is_quick else sizes:
        for spread in (1.0, 4.0):  # nearly flat, and as peaked as a language model's
            for name in PARAMETERS:
                yield _sample(name, batch, vocab, spread, device)
    yield _verify(64 if is_cuda else 8, 4, 131_072 if is_cuda else 32_000, device)


def _sample(name: str, batch: int, vocab: int, spread: float, device: torch.device) -> Case:
    logits = torch.randn(batch, vocab, device=device) * spread
    seeds, parameters = torch.arange(batch, device=device), PARAMETERS[name]

    def check() -> None:
        got = ops.sample(logits, seeds=seeds, **parameters)[:4].tolist()
        expected = reference.sample(logits[:4].cpu(), seeds=seeds[:4].cpu(), **parameters).tolist()
        assert got == expected, f"drew {got}, not {expected}"

    peers: dict[str, Callable[[], Any]] = {}
    if len(parameters) == 1 and "temperature" in parameters:
        peers["torch"] = lambda: torch.multinomial((logits / parameters["temperature"]).softmax(-1), 1)
    if importlib.util.find_spec("transformers") is not None:
        peers["transformers"] = _transformers(logits, parameters)
    return Case(
        "sample", f"{name}, B={batch} V={vocab} spread {spread:g}", lambda: ops.sample(logits, seeds=seeds, **parameters),
        check, peers, logits.nbytes, goals=dict.fromkeys(peers, 3.0 if device.type == "cuda" else 0.95),
    )  # fmt: skip


def _transformers(logits: torch.Tensor, parameters: dict[str, Any]) -> Callable[[], torch.Tensor]:
    from transformers.generation import logits_process

    kinds = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    warpers: list[Any] = [kind(parameters[name]) for name, kind in kinds.items() if name in parameters]

    def run() -> torch.Tensor:
        scores = logits
        for warper in warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)

    return run


def _verify(batch: int, g: int, vocab: int, device: torch.device) -> Case:
    scores = torch.randn(batch, g + 1, vocab, device=device) * 4
    target = scores.softmax(2)
    draft = (scores[:, :g] + torch.randn(batch, g, vocab, device=device) * 0.3).softmax(2)
    tokens = torch.multinomial(draft.view(-1, vocab), 1).view(batch, g)
    seeds = torch.arange(batch, device=device)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        p, q = (x.gather(2, tokens[:, :, None])[:, :, 0] for x in (target[:, :g], draft))
        num = (torch.rand_like(p) < p / q).cumprod(1).sum(1)
        rows = torch.arange(batch, device=device)
        rest = (target[:, :g] - draft).clamp_min(0)
        rest = torch.cat([rest, target[:, g:]], 1)[rows, num]
        return num, torch.multinomial(rest, 1)

    def check() -> None:
        got = ops.speculative_verify(tokens, draft, target, seeds)
        few = [x[:4].cpu() for x in (tokens, draft, target, seeds)]
        expected = reference.speculative_verify(*few)
        assert [x[:4].tolist() for x in got] == [x.tolist() for x in expected]

    return Case(
        "speculative_verify", f"B={batch} g={g} V={vocab}", lambda: ops.speculative_verify(tokens, draft, target, seeds),
        check, {"torch": plain}, 2.0 * batch * vocab * 4, goals={"torch": 1.0 if device.type == "cuda" else 0.95},
    )  # fmt: skip
