"""The expert store: what is in which slot, under any order of events and many threads; and the layer that runs through it."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import save_file

from penstock.kernels import InvalidInput, backends, ops
from penstock.kernels.experts import (
    QWEN3_MOE,
    ExpertFileError,
    ExpertMissing,
    ExpertStore,
    SlotsTooFew,
    StoreClosed,
    moe_offloaded,
)
from penstock.kernels.experts.estimate import MAX_AGE, Estimate
from penstock.kernels.experts.reference import moe_offloaded as reference
from penstock.kernels.experts.slots import Entry, Key, Slots

HIDDEN, INTER, EXPERTS, LAYERS = 16, 24, 6, 2
WAIT_S = 20


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.w_gate_up"] = torch.randn(EXPERTS, 2 * INTER, HIDDEN).to(dtype) / 4
        tensors[f"layers.{layer}.w_down"] = torch.randn(EXPERTS, HIDDEN, INTER).to(dtype) / 4
    return tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_tensors()


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "experts.safetensors")
    return tmp_path / "experts.safetensors"


@pytest.fixture
def make_store(file: Path) -> Iterator[Callable[..., ExpertStore]]:
    """Makes stores over the file, computed never on the CPU unless asked otherwise; closes them."""
    stores = []

    def make(num_slots: int, **settings: object) -> ExpertStore:
        stores.append(ExpertStore([file], num_slots, **{"cpu_compute": "never", **settings}))  # type: ignore[arg-type]
        stores[-1].cpu_compute = str(settings.get("cpu_compute", "never"))  # "auto" even though this is a CPU
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def use(store: ExpertStore, layer: int, *experts: int) -> None:
    """One request, checked: every expert's own weights are in its slot."""
    with store.acquire(layer, experts) as lease:
        lease.wait()
        for expert in experts:
            views, slot = store.files.views(layer, expert), lease.slots[expert]
            assert torch.equal(store.w_gate_up[slot], torch.cat(views.gate_up))
            assert torch.equal(store.w_down[slot], views.down)


def resident(store: ExpertStore) -> set[Key]:
    return set(store._slots.entries)


class SlotsAgainstModel(RuleBasedStateMachine):
    """`Slots` beside a plain list of (key, uses, last use): who leaves must be who the list says."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(4, self.policy)
        self.order: list[Key] = []  # resident keys, the one not used for longest first
        self.uses: Counter[Key] = Counter()
        self.leases: list[list[Entry]] = []
        self.loading: list[Entry] = []
        self.where: dict[Key, int] = {}

    def fixed(self) -> set[Key]:
        """Keys that must not leave: leased or being loaded."""
        return {entry.key for entries in [*self.leases, self.loading] for entry in entries}

    def leave(self, keep: set[Key]) -> Key:
        movable = [key for key in self.order if key not in self.fixed() | keep]
        return min(movable, key=lambda key: self.uses[key]) if self.policy == "lfu" else movable[0]

    def enter(self, key: Key, keep: set[Key]) -> None:
        if len(self.order) == 4:
            self.order.remove(gone := self.leave(keep))
            del self.where[gone]
        self.order.append(key)

    @rule(keys=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), unique=True, min_size=1, max_size=4))
    def take(self, keys: list[Key]) -> None:
        missing = [key for key in keys if key not in self.order]
        num_movable = len(set(self.order) - self.fixed() - set(keys))
        taken = self.slots.take(keys)
        if len(missing) > 4 - len(self.order) + num_movable:
            assert taken is None
            return
        assert taken is not None
        entries, added = taken
        assert [entry.key for entry in entries] == keys
        assert [entry.key for entry in added] == missing
        for key in missing:
            self.enter(key, set(keys))
        for key in keys:
            self.uses[key] += 1
            self.order.remove(key)
            self.order.append(key)
        self.where |= {entry.key: entry.slot for entry in entries}
        self.leases.append(entries)
        self.loading += added

    @rule(key=st.tuples(st.integers(0, 1), st.integers(0, 4)), is_admitted=st.booleans())
    def prefetch(self, key: Key, is_admitted: bool) -> None:
        is_full = len(self.order) == 4
        is_refused = key in self.order or (is_full and not set(self.order) - self.fixed())
        if is_admitted and not is_refused and is_full:
            is_refused = self.uses[self.leave(set())] >= self.uses[key]
        entry = (self.slots.admit if is_admitted else self.slots.prefetch)(key)
        assert (entry is None) == is_refused
        if entry is not None:
            self.enter(key, set())
            self.where[key] = entry.slot
            self.loading.append(entry)

    @rule(data=st.data(), is_there=st.booleans())
    def finish_a_load(self, data: st.DataObject, is_there: bool) -> None:
        if not self.loading:
            return
        entry = self.loading.pop(data.draw(st.integers(0, len(self.loading) - 1)))
        if is_there:
            self.slots.loaded(entry)
        else:
            self.slots.failed(entry)
            self.order.remove(entry.key)
            del self.where[entry.key]
            for lease in self.leases:
                if entry in lease:
                    lease.remove(entry)
                    self.slots.release([entry])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            self.slots.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @invariant()
    def same(self) -> None:
        self.slots.check()
        assert {key: entry.slot for key, entry in self.slots.entries.items()} == self.where
        assert set(self.order) == set(self.where)


class LfuSlotsAgainstModel(SlotsAgainstModel):
    policy = "lfu"


TestLru = SlotsAgainstModel.TestCase
TestLfu = LfuSlotsAgainstModel.TestCase
TestLru.settings = TestLfu.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_lru_and_lfu_keep_different_experts(make_store: Callable[..., ExpertStore]) -> None:
    kept = {}
    for policy in ("lru", "lfu"):
        store = make_store(2, policy=policy)
        for expert in (0, 0, 0, 1, 2, 3):
            use(store, 0, expert)
        kept[policy] = resident(store)
        assert store.statistics().evictions == 2
    assert kept == {"lru": {(0, 2), (0, 3)}, "lfu": {(0, 0), (0, 3)}}


def test_statistics(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(3)
    use(store, 0, 0, 1)  # two misses with nothing there
    use(store, 0, 1, 2)  # one hit, one miss, with 2 of 6 there
    use(store, 1, 5)  # a miss with none of its layer there, for which expert 0 leaves
    use(store, 0, 1, 2)  # two hits with 2 of 6 there
    got = store.statistics()
    assert (got.hits, got.misses, got.fetches, got.evictions, got.waits, got.failures) == (3, 4, 4, 1, 0, 0)
    assert got.random_hits == pytest.approx(4 * 2 / 6)
    assert got.hit_rate == pytest.approx(3 / 7)
    assert got.random_hit_rate == pytest.approx(4 / 3 / 7)
    assert got.num_bytes == 4 * 3 * INTER * HIDDEN * 4


@pytest.mark.parametrize("is_made_in_inference_mode", [True, False])
def test_inference_mode(make_store: Callable[..., ExpertStore], is_made_in_inference_mode: bool) -> None:
    with torch.inference_mode(is_made_in_inference_mode):
        store = make_store(2, cpu_compute="auto")
    with torch.inference_mode(not is_made_in_inference_mode):
        x, router_w = torch.randn(8, HIDDEN), torch.randn(EXPERTS, HIDDEN)
        for _ in range(3):
            assert moe_offloaded(x, router_w, store, 0, top_k=2).isfinite().all()
        use(store, 0, 4, 5)


def test_random_requests_hit_as_often_as_the_random_rate_says(make_store: Callable[..., ExpertStore]) -> None:
    store, generator = make_store(3), torch.Generator().manual_seed(1)
    for _ in range(600):
        with store.acquire(0, [int(torch.randint(EXPERTS, (1,), generator=generator))]) as lease:
            lease.wait()
    got = store.statistics()
    assert got.random_hit_rate == pytest.approx(0.5, abs=0.01)
    assert got.hit_rate == pytest.approx(got.random_hit_rate, abs=0.08)  # 4 standard deviations


def test_prefetch_makes_hits_and_takes_no_slot_in_use(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(2)
    assert store.prefetch(0, [3, 3, 4]) == 2
    use(store, 0, 3, 4)
    assert (store.statistics().hits, store.statistics().prefetches) == (2, 2)
    with store.acquire(0, [0, 1]) as lease:
        lease.wait()
        assert store.prefetch(0, [2, 5]) == 0
        assert resident(store) == {(0, 0), (0, 1)}


def test_two_requests_for_an_expert_load_it_once(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(2)
    gate = threading.Event()
    blocked = store._copier._thread.submit(gate.wait, WAIT_S)  # so that all requests come before the first load
    with ThreadPoolExecutor(8) as threads:
        uses = [threads.submit(use, store, 1, 4) for _ in range(8)]
        wait_until(lambda: store.statistics().hits + store.statistics().misses == 8)
        gate.set()
        assert blocked.result()
        for done in uses:
            done.result(WAIT_S)
    got = store.statistics()
    assert (got.misses, got.hits, got.fetches) == (1, 7, 1)


def wait_until(is_true: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(WAIT_S * 1000):
        if is_true():
            return
        done.wait(0.001)
    raise AssertionError("it did not come true")


def test_a_slot_in_use_is_waited_for(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(2)
    with ThreadPoolExecutor(1) as threads:
        with store.acquire(0, [0, 1]) as lease:
            lease.wait()
            other = threads.submit(use, store, 0, 2)
            wait_until(lambda: store.statistics().waits == 1)
            assert resident(store) == {(0, 0), (0, 1)}
            assert not other.done()
        other.result(WAIT_S)
    assert (0, 2) in resident(store)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_many_threads(make_store: Callable[..., ExpertStore], policy: str) -> None:
    store = make_store(4, policy=policy)

    def hammer(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            count, layer = int(torch.randint(1, 4, (1,), generator=generator)), seed % 2
            experts = torch.randperm(EXPERTS, generator=generator)[:count].tolist()
            if seed % 3 == 0:
                store.prefetch(layer, experts)
            use(store, layer, *experts)  # checks the weights in the slots while it holds them
            store._slots.check()
        return seed

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(hammer, range(6), timeout=60)) == list(range(6))
    got = store.statistics()
    assert got.fetches == got.misses + got.prefetches
    assert got.evictions == got.fetches - len(resident(store))
    assert not any(entry.num_refs or entry.is_loading for entry in store._slots.entries.values())


def test_errors(make_store: Callable[..., ExpertStore], tmp_path: Path, file: Path, tensors: dict[str, torch.Tensor]) -> None:
    store = make_store(2)
    with pytest.raises(ExpertMissing, match="no expert 6 of layer 1"):
        store.acquire(1, [6])
    with pytest.raises(ExpertMissing, match="no expert 0 of layer 9"):
        store.prefetch(9, [0])
    with pytest.raises(SlotsTooFew, match="3 experts are needed at once; the store has 2 slots"):
        store.acquire(0, [0, 1, 2])
    with pytest.raises(ValueError, match="distinct"):
        store.acquire(0, [1, 1])
    for settings_, message in (({"policy": "fifo"}, "lru or lfu"), ({"cpu_compute": "no"}, "auto, never, always")):
        with pytest.raises(ValueError, match=message):
            ExpertStore([file], 2, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_slots"):
        ExpertStore([file], 0)
    with pytest.raises(ExpertFileError, match="cannot be read"):
        ExpertStore([tmp_path / "none"], 2)
    with pytest.raises(ExpertFileError, match=r"no tensor in the files is called like 'model\.layers"):
        ExpertStore([file], 2, names=QWEN3_MOE)
    other = tmp_path / "other.safetensors"
    save_file({**tensors, "layers.1.w_down": torch.zeros(EXPERTS, HIDDEN, INTER + 1)}, other)
    with pytest.raises(ExpertFileError, match=r"expert 0 of layer 1 differs from the first one.*: it has"):
        ExpertStore([other], 2)
    other.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExpertFileError, match="cannot be read"):
        ExpertStore([other], 2)
    store.close()
    with pytest.raises(StoreClosed):
        store.acquire(0, [0])


def test_a_file_cut_short_while_in_use(make_store: Callable[..., ExpertStore], file: Path) -> None:
    store = make_store(2)
    use(store, 0, 1)
    data = file.read_bytes()
    os.truncate(file, len(data) - 8)
    with pytest.raises(ExpertFileError, match="was cut from"), store.acquire(0, [2]) as lease:
        lease.wait()
    assert resident(store) == {(0, 1)}
    assert store.statistics().failures == 1
    file.write_bytes(data)
    use(store, 0, 1, 2)  # it can be had again


def test_closing_wakes_who_waits(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(1)
    with ThreadPoolExecutor(1) as threads, store.acquire(0, [0]):
        other = threads.submit(use, store, 0, 1)
        wait_until(lambda: store.statistics().waits == 1)
        store.close()
        with pytest.raises(StoreClosed):
            other.result(WAIT_S)


def test_names_of_a_checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor], file: Path) -> None:
    split = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            gate, up = tensors[f"layers.{layer}.w_gate_up"][expert].chunk(2)
            parts = (gate, up, tensors[f"layers.{layer}.w_down"][expert])
            for name, part in zip((*QWEN3_MOE.gate_up, QWEN3_MOE.down), parts, strict=True):
                split[name.format(layer=layer, expert=expert)] = part.clone()
    halves = [dict(list(split.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{i}.safetensors")
    paths = [tmp_path / f"model-{i}.safetensors" for i in range(2)]
    with ExpertStore(paths, 3, names=QWEN3_MOE) as ours, ExpertStore([file], 3) as stacked:
        assert ours.files.num_experts == stacked.files.num_experts == {0: EXPERTS, 1: EXPERTS}
        for store in (ours, stacked):
            use(store, 1, 5, 0)
    save_file({name: t for name, t in split.items() if ".2.up_proj" not in name}, tmp_path / "gap.safetensors")
    with pytest.raises(ExpertMissing, match=r"experts\.2\.up_proj"):
        ExpertStore([tmp_path / "gap.safetensors"], 2, names=QWEN3_MOE)


def test_the_sooner_of_fetching_and_computing() -> None:
    estimate = Estimate()
    assert estimate.choose_cpu({1: 1, 2: 1}) == [2]  # neither is known: each is tried
    estimate.observe_fetch(1.0)
    estimate.observe_cpu(1, 0.3)
    assert estimate.cpu_s(1) == 0.3
    assert estimate.cpu_s(8) == pytest.approx(2.4)
    # 0.3 s each on the CPU, one after the other, while fetches of 1 s go on: the fourth would end after 1.2 s.
    assert estimate.choose_cpu(dict.fromkeys(range(4), 1)) == [0, 1, 2]
    assert estimate.choose_cpu({0: 8, 1: 8}) == []  # 2.4 s against 1 s, then against 2 s
    assert estimate.choose_cpu(dict.fromkeys(range(3), 8)) == [2]  # and against 3 s
    assert estimate.choose_cpu({}) == []
    estimate.observe_cpu(1, 1.3)
    assert estimate.cpu_s(1) == pytest.approx(0.5)
    for _ in range(MAX_AGE + 1):
        estimate.observe_fetch(0.01)
    assert estimate.cpu_s(1) is None  # measured anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "num_slots"), [(0, 2, 2), (1, 1, 1), (1, 6, 6), (7, 2, 2), (64, 3, 4), (64, 2, 6)])
@pytest.mark.parametrize("cpu_compute", ["never", "auto", "always"])
def test_moe_offloaded(tmp_path: Path, tokens: int, top_k: int, num_slots: int, cpu_compute: str, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    save_file(tensors, tmp_path / "experts.safetensors")
    x, router_w = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)
    with ExpertStore([tmp_path / "experts.safetensors"], num_slots, cpu_compute=cpu_compute) as store:
        assert store.cpu_compute == ("never" if cpu_compute == "never" else "always")
        store.cpu_compute = cpu_compute  # what a GPU would do, too
        for layer in (1, 0, 1):
            weights = tensors[f"layers.{layer}.w_gate_up"], tensors[f"layers.{layer}.w_down"]
            for renormalize in (True, False):
                settings_ = {"top_k": top_k, "renormalize": renormalize}
                got = moe_offloaded(x, router_w, store, layer, **settings_)
                if cpu_compute == "never":
                    assert torch.equal(got, ops.moe(x, router_w, *weights, **settings_))
                expected = reference(x, router_w, dict(enumerate(zip(*weights, strict=True))), **settings_)
                error = (got.float() - expected.float()).abs().amax(1)
                assert (error <= (1e-5 if dtype == torch.float32 else 3e-2) * expected.float().abs().amax(1)).all()
        got = store.statistics()
        assert got.on_cpu == {"never": 0, "always": got.misses}.get(cpu_compute, got.on_cpu)
        assert got.hits + got.misses > 0 or not tokens


def test_moe_offloaded_in_triton(make_store: Callable[..., ExpertStore], tensors: dict[str, torch.Tensor]) -> None:
    if not backends.has_triton(torch.device("cpu")):
        pytest.skip("triton is not installed")
    x, router_w = torch.randn(9, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    store = make_store(2, cpu_compute="auto")
    store.w_gate_up.fill_(torch.nan)
    expected = ops.moe(x, router_w, tensors["layers.0.w_gate_up"], tensors["layers.0.w_down"], top_k=2)
    with backends.forced("triton"):
        torch.testing.assert_close(moe_offloaded(x, router_w, store, 0, top_k=2), expected, rtol=1e-5, atol=1e-5)


def test_computing_on_the_cpu_fills_slots_with_what_is_used_most(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(1, cpu_compute="auto")
    rows = torch.randn(1, HIDDEN)
    use(store, 0, 5)
    for expert in (3, 3, 3):
        store.compute_on_cpu(0, expert, rows)
    wait_until(lambda: resident(store) == {(0, 3)})
    store.compute_on_cpu(0, 2, rows)  # used less often: it stays where it is
    assert resident(store) == {(0, 3)}
    got = store.statistics()
    assert (got.on_cpu, got.prefetches) == (4, 1)


def test_moe_offloaded_refuses(make_store: Callable[..., ExpertStore]) -> None:
    store, x, router_w = make_store(2), torch.zeros(1, HIDDEN), torch.zeros(EXPERTS, HIDDEN)
    with pytest.raises(SlotsTooFew, match="a token needs 3 experts at once; the store has 2 slots"):
        moe_offloaded(x, router_w, store, 0, top_k=3)
    with pytest.raises(ExpertMissing, match="no layer 7"):
        moe_offloaded(x, router_w, store, 7, top_k=1)
    with pytest.raises(InvalidInput, match=r"has 6 experts of hidden 16, torch\.float32 on cpu"):
        moe_offloaded(x, router_w[1:], store, 0, top_k=1)
    with pytest.raises(InvalidInput, match=r"got x torch\.bfloat16"):
        moe_offloaded(x.bfloat16(), router_w.bfloat16(), store, 0, top_k=1)
    with pytest.raises(InvalidInput, match="top_k"):
        moe_offloaded(x, router_w, store, 0, top_k=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cpu_compute", ["never", "auto", "always"])
def test_moe_offloaded_on_cuda(file: Path, tensors: dict[str, torch.Tensor], cpu_compute: str) -> None:
    router_w = torch.randn(EXPERTS, HIDDEN)
    on_device = {name: tensor.cuda() for name, tensor in tensors.items()}
    with ExpertStore([file], 3, device="cuda", cpu_compute=cpu_compute) as store:
        for i in range(60):
            x, layer = torch.randn(1 + i % 5, HIDDEN), i % 2
            weights = on_device[f"layers.{layer}.w_gate_up"], on_device[f"layers.{layer}.w_down"]
            got = moe_offloaded(x.cuda(), router_w.cuda(), store, layer, top_k=2)
            expected = ops.moe(x.cuda(), router_w.cuda(), *weights, top_k=2)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_slot_is_not_filled_before_its_readers_are_done(file: Path) -> None:
    with ExpertStore([file], 1, device="cuda", cpu_compute="never") as store:
        expected = [store.files.views(0, expert).down.clone() for expert in range(EXPERTS)]
        copies = []
        for expert in range(EXPERTS):
            with store.acquire(0, [expert]) as lease:
                lease.wait()
                torch.cuda._sleep(20_000_000)  # the reader begins late; the next load must not overtake it
                copies.append(store.w_down[lease.slots[expert]].clone())
        for copy, weight in zip(copies, expected, strict=True):
            assert torch.equal(copy.cpu(), weight)
