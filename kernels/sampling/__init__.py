"""Tokens drawn from logits, and drafts of tokens verified, with a seed per row."""

import math

import torch

from penstock.kernels import backends
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import FLOATS, Row, Tensor
from penstock.kernels.sampling import thresholds, verify
from penstock.kernels.sampling.draw import MAX_VOCAB
from penstock.kernels.spec import Cost

_SEED = Row(minimum=-(2.0**53), maximum=2.0**53)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sample(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    seeds: torch.Tensor,
) -> torch.Tensor:
    """One token per row, int64 `[batch]`: drawn from softmax(logits / temperature) after top-k, top-p and min-p.

    logits: float `[batch, vocab]`, computed in float32. The parameters are numbers or `[batch]` tensors, and count in
    float32. seeds: int64 `[batch]`; a step of generation gives each row another one.

    - `temperature` >= 0; 0 gives the most likely token, the lowest of equals.
    - `top_k` >= 0: the k largest, and what equals the last of them; 0 or more than vocab = all.
    - `top_p`, above 0 to 1: of what top-k left, renormalised, the most likely until they reach top_p together: the token
      that crosses it is kept, and what equals that one.
    - `min_p`, 0 to 1: of what is left, those with at least min_p times the probability of the most likely.

    The most likely token is always kept. These are transformers' warpers in their order (temperature, top-k, top-p, min-p),
    but for equal scores at the bound of top-p, which they cut at random. Scores are equal if (logit - largest) / temperature
    is in float32. A row with NaN or +inf, or of -inf only, has no distribution: its token is -1.

    A token depends on its row's logits, parameters and seed only, bit for bit on one kind of device, whatever shares the
    batch. Tokens of less than 2^-40 times the largest probability are never drawn. Tolerance: the distribution is exact to
    1e-6. Raises InvalidInput for wrong shapes and numbers out of range; tensors on an accelerator are not looked at, and
    count as the nearest value that is allowed. Source: Fan et al. 2018 (top-k), Holtzman et al. 2019 (top-p), Nguyen et al.
    2024 (min-p).
    """
    if logits.ndim != 2 or logits.dtype not in _FLOATS or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise InvalidInput(
            f"sample: logits must be float [batch, vocab] with 1 to {MAX_VOCAB} tokens; got {logits.dtype} {list(logits.shape)}"
        )
    seeds = _seeds("sample", seeds, logits)
    t = _parameter("temperature", temperature, logits, 0.0, math.inf)
    k = _parameter("top_k", top_k, logits, 0, math.inf)
    p = _parameter("top_p", top_p, logits, math.ulp(0.0), 1.0)
    m = _parameter("min_p", min_p, logits, 0.0, 1.0)
    if backends.choose("sample", logits.device, backends.torch_or_triton(logits.device)) == "triton":
        from penstock.kernels.sampling import pivots

        return pivots.sample(logits, t, k if isinstance(k, torch.Tensor) else int(min(k, logits.shape[1])), p, m, seeds)
    if logits.device.type == "mps":  # no float64 there
        return _sample_in_torch(logits.cpu(), t, k, p, m, seeds.cpu()).to(logits.device)
    return _sample_in_torch(logits, t, k, p, m, seeds)


def speculative_verify(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_probs: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts drafts so that what comes out has the target's distribution; (num_accepted, tokens).

    draft_tokens: int64 `[batch, g]`. draft_probs: float `[batch, g, vocab]`, what each draft was drawn from, after
    temperature and filters; None for drafts that were not drawn (prompt lookup): all probability on the draft.
    target_probs: float `[batch, g + 1, vocab]`. seeds: int64 `[batch]`, not those that the drafts were drawn with.

    Draft d is accepted with probability min(1, p(d) / q(d)); at the first that is not, a token is drawn from
    max(p - q, 0), normalised (from p if that is zero everywhere); if all are, from target_probs[:, g]. Returns num_accepted
    int64 `[batch]` and tokens int64 `[batch, g + 1]`: the accepted drafts, the drawn token, then -1. A draft outside of
    the vocabulary, as -1, ends a row that has fewer drafts: the token is drawn from p there.

    Probabilities need not add up to 1 exactly: ratios count as given, what is drawn from is normalised. They count in
    float32, between 0 and 1, NaN as 0; where nothing is left to draw from the token is -1. A row depends on itself only,
    bit for bit. Tolerance: distributions are exact to 1e-6. Raises InvalidInput for shapes that do not fit.
    Source: Leviathan et al. 2023, Chen et al. 2023.
    """
    shape, target = list(draft_tokens.shape), list(target_probs.shape)
    fits = draft_tokens.ndim == 2 and target_probs.ndim == 3 and target[:2] == [shape[0], shape[1] + 1]
    if not fits or not 1 <= target[2] <= MAX_VOCAB or target_probs.dtype not in _FLOATS:
        raise InvalidInput(
            f"speculative_verify: for draft_tokens [batch, g], target_probs must be float [batch, g + 1, vocab] with 1 to "
            f"{MAX_VOCAB} tokens; got {shape} and {target_probs.dtype} {target}"
        )
    if draft_probs is not None and (list(draft_probs.shape) != [*shape, target[2]] or draft_probs.dtype not in _FLOATS):
        got = f"{draft_probs.dtype} {list(draft_probs.shape)}"
        raise InvalidInput(f"speculative_verify: draft_probs must be float {[*shape, target[2]]}; got {got}")
    seeds = _seeds("speculative_verify", seeds, target_probs)
    drafts = _integers("speculative_verify", "draft_tokens", draft_tokens)
    device = target_probs.device
    if backends.choose("speculative_verify", device, backends.torch_or_triton(device)) == "triton":
        from penstock.kernels.sampling import pivots

        return pivots.speculative_verify(drafts, draft_probs, target_probs, seeds)
    if device.type == "mps":
        draft_probs = None if draft_probs is None else draft_probs.cpu()
        accepted, tokens = verify.speculative_verify(drafts.cpu(), draft_probs, target_probs.cpu(), seeds.cpu())
        return accepted.to(device), tokens.to(device)
    return verify.speculative_verify(drafts, draft_probs, target_probs, seeds)


@kernel(
    "sample",
    inputs={
        "logits": Tensor(dtypes=FLOATS, rank=1),
        "seed": _SEED,
        "temperature": Row(1.0, minimum=0.0),
        "top_k": Row(0, minimum=0),
        "top_p": Row(1.0, minimum=1e-9, maximum=1.0),
        "min_p": Row(0.0, minimum=0.0, maximum=1.0),
    },
    cost=Cost(base_ms=0.05, per={"logits.numel": 3e-6}),
    combine="sum",
    max_batch_size=256,
)
def sample_rows(
    logits: torch.Tensor,
    seed: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """A token per task, int64 `[batch]`: see `penstock.kernels.sampling.sample`.

    logits: float `[vocab]`. `seed`: an integer of at most 2^53 in magnitude, which a float64 holds exactly (2^24 on Apple's
    devices, whose rows are float32); `temperature`, `top_k`, `top_p` (at least 1e-9) and `min_p` may differ within a batch.
    Logits with NaN or +inf, or all -inf, are refused. The same seed, the same token, whatever shares the batch.
    """
    tokens = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=_whole("sample", seed))
    if bool((tokens < 0).any()):
        raise InvalidInput("sample: logits must hold a finite number, no NaN and no +inf")
    return tokens


@kernel(
    "speculative_verify",
    inputs={
        "draft_tokens": Tensor(dtypes=("int32", "int64"), rank=1),
        "draft_probs": Tensor(dtypes=FLOATS, rank=2),
        "target_probs": Tensor(dtypes=FLOATS, rank=2),
        "seed": _SEED,
    },
    cost=Cost(base_ms=0.05, per={"target_probs.numel": 1e-6}),
    combine="sum",
    max_batch_size=64,
)
def verify_rows(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor, seed: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Drafts of one task, accepted or not: see `penstock.kernels.sampling.speculative_verify`.

    draft_tokens: int `[g]`. draft_probs: float `[g, vocab]`, or `[0, vocab]` for drafts that were not drawn.
    target_probs: float `[g + 1, vocab]`. `seed`: as for the kernel `sample`. Returns `num_accepted`: int64 `[batch]`, and
    `tokens`: int64 `[batch, g + 1]`, -1 after the drawn token.
    """
    is_drawn = draft_probs.shape[1] > 0 or draft_tokens.shape[1] == 0
    probs = draft_probs if is_drawn else None
    accepted, tokens = speculative_verify(draft_tokens, probs, target_probs, _whole("speculative_verify", seed))
    return {"num_accepted": accepted, "tokens": tokens}


def _sample_in_torch(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: float | torch.Tensor,
    top_p: float | torch.Tensor,
    min_p: float | torch.Tensor,
    seeds: torch.Tensor,
) -> torch.Tensor:
    def row(value: float | torch.Tensor, high: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(logits.device).clamp(0, high).to(dtype)
        return torch.full((len(logits),), min(value, high), dtype=dtype, device=logits.device)

    vocab = logits.shape[1]
    k = row(top_k, vocab, torch.int64)
    return thresholds.sample(logits, row(temperature, math.inf), k, row(top_p, 1.0), row(min_p, 1.0), seeds)


def _parameter(
    name: str, value: float | torch.Tensor, logits: torch.Tensor, low: float, high: float
) -> float | torch.Tensor:
    """`value` as a number or a `[batch]` tensor beside `logits`, checked where that costs no wait for a device."""
    is_whole = isinstance(low, int)
    if not isinstance(value, torch.Tensor):
        is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise InvalidInput(f"sample: {name} must be a number {_range(low, high)}; got {shown(value)}")
        return value if is_whole else float(value)
    if value.shape != logits.shape[:1] or value.dtype == torch.bool or value.is_complex():
        raise InvalidInput(f"sample: {name} must be a number or [{len(logits)}]; got {value.dtype} {list(value.shape)}")
    if value.device.type == "cpu" and not bool(((value >= low) & (value <= high)).all()):
        raise InvalidInput(f"sample: {name} must be {_range(low, high)} in every row")
    return value.to(logits.device)


def _range(low: float, high: float) -> str:
    least = "above 0" if low == math.ulp(0.0) else f"of at least {low:g}"
    return least if high == math.inf else f"{least}, {high:g} at most"


def _seeds(owner: str, seeds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if seeds.shape != rows.shape[:1]:
        raise InvalidInput(f"{owner}: seeds must be int64 [{len(rows)}], one for each row; got {list(seeds.shape)}")
    return _integers(owner, "seeds", seeds).to(rows.device).contiguous()


def _integers(owner: str, name: str, values: torch.Tensor) -> torch.Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise InvalidInput(f"{owner}: {name} must be integers; got {values.dtype}")
    return values.to(torch.int64)


def _whole(owner: str, seed: torch.Tensor) -> torch.Tensor:
    """Seeds that came as floats. The device is not waited for: a fraction is cut off there."""
    if seed.device.type == "cpu" and not bool((seed == seed.trunc()).all()):
        raise InvalidInput(f"{owner}: the seed must be a whole number")
    return seed.to(torch.int64)
