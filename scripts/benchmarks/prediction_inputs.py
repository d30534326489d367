"""Inputs for the prediction benchmark: random batches of the built-in kernels, as a broker and a worker see them.

Knows sizes, shapes and statics that make short and long work. Payloads are cut from one buffer, so that a thousand
batches of megabytes fit.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from penstock.broker.columns import Block, pack
from penstock.broker.layout import FRAMED_ROW_BYTES, Column
from penstock.broker.protocol import Answer, Assign, Resident, Submit
from penstock.broker.scheduling.prediction import BatchLoad
from penstock.broker.spec import Spec, parse
from penstock.kernels import registry
from penstock.worker.batch import run_alone
from penstock.worker.clock import Clock
from penstock.worker.runner import Runner

PRINCIPAL = "bench"
KERNELS = ("softmax", "matmul", "search", "sha256", "transform", "aggregate", "embed")
RAGGED = frozenset(("sha256", "transform", "aggregate", "embed"))
"""Their rows differ in size within a batch."""
POOL_BYTES = 64 << 20
EXPRESSIONS = (
    ["total = a * b"],
    ["total = a * b", "tax = total * 0.2", "net = where(total > 1, total - tax, total)"],
    ["x = sin(a) + cos(b)", "y = exp(-abs(c)) * x", "z = log1p(abs(d)) / (1 + x * x)", "w = tanh(x + y + z)"],
)
MEASURES = (
    {"measures": ["count()", "sum(a)"]},
    {"measures": ["mean(a)", "std(b)", "max(c)"]},
    {"measures": ["sum(a * b)", "count()"], "by": "key"},
)
CORPORA = ((5_000, 64), (20_000, 128), (50_000, 256))
EMBED = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 256, "vocab_size": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Input:
    """One batch: what the worker gets, and what the predictor is told about it."""

    assign: Assign
    load: BatchLoad


class Bench:
    """The kernels of one process, and random batches for them. No broker runs: `Spec` binds and prices as it does there."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        pool = np.random.default_rng(seed).standard_normal(POOL_BYTES // 4, dtype=np.float32)
        self._pool = memoryview(bytearray(pool.tobytes()))
        self._words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "sort", "word", "return", "list"]
        options = {"embed": {"model": str(_write_model(folder / "model", self._words))}}
        kernels = registry.load(options=options, only={*KERNELS, "corpus"}, entry_points=False)
        self._runner = Runner(kernels, torch.device("cpu"), folder, _ignore)
        self._specs: dict[str, Spec] = {name: parse(kernel.spec.to_wire()) for name, kernel in kernels.items()}
        self._makers: dict[str, Callable[[], Input]] = {name: getattr(self, f"_{name}") for name in KERNELS}
        for n, d in CORPORA:
            vectors = Column("vectors", "float32", (n, d), is_framed=True)
            _, clock = self.run(self._input("corpus", [(vectors, None, [self._bytes(4 * n * d)])], {"name": f"c{n}"}))
            assert clock > 0

    def make(self, kernel: str) -> Input:
        """A random batch."""
        return self._makers[kernel]()

    def run(self, item: Input) -> tuple[list[Answer], float]:
        """(answers, milliseconds that the worker would report without loading)."""
        answers, clock, _ = run_alone(self._runner, item.assign, 0.0)
        assert all(a.error is None for a in answers), answers[0].error
        return answers, _taken(clock)

    def _input(
        self, kernel: str, columns: Iterable[tuple[Column, Any, Sequence[Any]]], statics: Mapping[str, Any], num_rows: int = 1
    ) -> Input:
        block = pack(columns, num_rows)
        packed = msgpack.packb(statics) if statics else b""
        spec = self._specs[kernel]
        bound = spec.bind(Submit(id=bytes(16), kernel=kernel, block=block, statics=packed), PRINCIPAL)
        assign = Assign(lease=1, kernel=kernel, blocks=[_received(bound.block)], statics=packed, principal=PRINCIPAL)
        cost = bound.cost_ms
        is_sum = spec.combine == "sum"
        costs = cost if isinstance(cost, list) else [cost] * num_rows
        context = hashlib.blake2b(repr(bound.key[3:6]).encode(), digest_size=8).digest()
        num_bytes = float(block.nbytes if is_sum else block.nbytes / num_rows)
        load = BatchLoad(kernel, context, spec.combine, num_rows, sum(costs) if is_sum else max(costs), num_bytes)
        return Input(assign, load)

    def _bytes(self, count: int) -> memoryview:
        start = 64 * self.rng.randrange(max((POOL_BYTES - count) // 64, 1))
        return self._pool[start : start + count]

    def _upto(self, low: float, high: float) -> int:
        """Log-uniform."""
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def _tensor(self, name: str, shape: tuple[int, ...], num_rows: int) -> tuple[Column, Any, Sequence[Any]]:
        size = 4 * math.prod(shape)
        if size < FRAMED_ROW_BYTES:
            return Column(name, "float32", shape), None, [self._bytes(size * num_rows)]
        return Column(name, "float32", shape, is_framed=True), None, [self._bytes(size) for _ in range(num_rows)]

    # --- one batch of each kernel ----------------------------------------------------------------------------------

    def _softmax(self) -> Input:
        size = self.rng.choice((4096, 65_536, 262_144, 1_048_576))
        num_rows = self._upto(1, min(256, 25_000_000 // size))
        shape = self.rng.choice(((size,), (64, size // 64)))
        return self._input("softmax", [self._tensor("x", shape, num_rows)], {"axis": self.rng.choice((0, -1))}, num_rows)

    def _matmul(self) -> Input:
        m, n, k = (self.rng.choice((128, 384, 1024)) for _ in range(3))
        num_rows = self._upto(1, min(64, max(2, 4_000_000_000 // (m * n * k))))
        return self._input("matmul", [self._tensor("a", (m, k), num_rows), self._tensor("b", (k, n), num_rows)], {}, num_rows)

    def _search(self) -> Input:
        n, d = self.rng.choice(CORPORA)
        num_rows = self._upto(1, 256)
        statics = {"corpus": f"c{n}", "k": self.rng.choice((10, 100))}
        return self._input("search", [self._tensor("query", (d,), num_rows)], statics, num_rows)

    def _sha256(self) -> Input:
        sizes = [self._upto(1000, 8_000_000) for _ in range(self._upto(1, 64))]
        column = Column("data", "bytes", (), True, True)
        return self._input("sha256", [(column, sizes, [self._bytes(s) for s in sizes])], {}, len(sizes))

    def _table(self, kernel: str, most: float, statics: Mapping[str, Any]) -> Input:
        sizes = [self._upto(5000, most) for _ in range(self._upto(1, 12))]
        names = ["a", "b", "c", "d", "key"]
        column = Column("table", "float32", (len(names),), True, True)
        rows = [self._pool[: 4 * len(names) * size] for size in sizes]
        return self._input(kernel, [(column, sizes, rows)], {"columns": names, **statics}, len(sizes))

    def _transform(self) -> Input:
        return self._table("transform", 1_000_000, {"expressions": self.rng.choice(EXPRESSIONS)})

    def _aggregate(self) -> Input:
        return self._table("aggregate", 300_000, self.rng.choice(MEASURES))

    def _embed(self) -> Input:
        texts = [" ".join(self.rng.choices(self._words, k=self._upto(2, 120))).encode() for _ in range(self._upto(1, 24))]
        column = Column("text", "str", (), True, True)
        return self._input("embed", [(column, [len(t) for t in texts], texts)], {}, len(texts))


def _received(block: Block) -> Block:
    """The block over writable buffers, as received frames are."""
    return Block(block.num_rows, block.layout, block.lengths, [memoryview(f) for f in block.frames])


def _taken(clock: Clock) -> float:
    return clock.h2d_ms + clock.compute_ms + clock.d2h_ms


def _ignore(resident: Resident) -> None:
    pass


def _write_model(folder: Path, words: list[str]) -> Path:
    """A small BERT of random weights, as sentence-transformers lays it out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(EMBED))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    d, wide, weights = EMBED["hidden_size"], EMBED["intermediate_size"], dict[str, torch.Tensor]()

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(shape) / shape[-1] ** 0.5
        if "_embeddings" not in name:
            weights[f"{name}.bias"] = torch.zeros(shape[0])

    for kind, count in (("word", EMBED["vocab_size"]), ("position", EMBED["max_position_embeddings"]), ("token_type", 2)):
        add(f"embeddings.{kind}_embeddings", count, d)
    add("embeddings.LayerNorm", d)
    for i in range(EMBED["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{layer}.attention.{part}", d, d)
        add(f"{layer}.intermediate.dense", wide, d)
        add(f"{layer}.output.dense", d, wide)
        add(f"{layer}.attention.output.LayerNorm", d)
        add(f"{layer}.output.LayerNorm", d)
    save_file(weights, folder / "model.safetensors")
    return folder
