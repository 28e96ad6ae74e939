"""Check on one GPU that blocks move exactly, and how fast: without vLLM and Ray, in four minutes.

``python -m scripts.gpu_check [--device cuda|cpu] [--small]`` needs torch, numpy, msgspec and pyzmq.
A line a check: PASS, FAIL, SKIP with the reason, or INFO with figures. The exit status is 1 if any
failed. What is checked: copies in every layout of a KV cache; locked staging memory that another
process reads; copies beside steps in flight; shards of workers; whole moves between two processes
over each transport, and with one of them killed between stages, over a fake engine that computes
each token from what the KV cache holds. With ``--device cpu`` all runs that needs no GPU.

Written and run without a GPU: its CPU half is a test. Nothing here shows that a model decodes the
same; ``make gpu-demo`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llumsched.core.transfer_options import AUTO, TRANSPORTS
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, runs_of
from llumsched.engine.transfer.shards import ShardedKV, ShardOpened, serve_shard
from llumsched.engine.transfer.shared_ring import ReceiveRing, RingOffer, SendRing
from scripts.gpu import moves

# Order of the axes layer, block, head, token, content in memory, outermost first, as vLLM names it.
LAYOUTS = {
    "LBNHC": (0, 1, 3, 2, 4),
    "LBHNC": (0, 1, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BHLNC": (1, 2, 0, 3, 4),
    "LHBNC": (0, 2, 1, 3, 4),
}
BYTES_PER_GB = 1e9
NUM_CYCLES = 400_000_000  # of a GPU's clock: about 0.2 s


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(slots=True)
class Checks:
    """Runs one check after another, and says what came out."""

    device: torch.device
    small: bool
    num_failed: int = field(default=0, init=False)

    def say(self, verdict: str, name: str, detail: str = "") -> None:
        self.num_failed += verdict == "FAIL"
        print(f"{verdict:4} {name}{f': {detail}' if detail else ''}", flush=True)

    def run(self, name: str, check: Callable[[Checks], str]) -> None:
        started_s = time.perf_counter()
        try:
            detail = check(self)
        except Skipped as skipped:
            self.say("SKIP", name, str(skipped))
        except Exception as error:  # whatever a driver thinks of; the other checks go on
            self.say("FAIL", name, f"{error!r}"[:300])
        else:
            self.say("PASS", name, f"{detail} ({time.perf_counter() - started_s:.1f} s)".strip())

    @property
    def needs_cuda(self) -> torch.device:
        if self.device.type != "cuda":
            raise Skipped("it needs a GPU")
        return self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A KV cache of one backing buffer; ``views`` has a ``[block, head, token, byte]`` a layer."""

    views: list[torch.Tensor]
    blocks: KVBlocks

    def content(self, block_id: int) -> list[torch.Tensor]:
        return [view[block_id].cpu().clone() for view in self.views]

    def has(self, block_id: int, content: Sequence[torch.Tensor]) -> bool:
        return all(map(torch.equal, self.content(block_id), content))


def make_cache(
    device: torch.device,
    seed: int,
    layout: str = "LBNHC",
    *,
    num_layers: int = 4,
    num_blocks: int = 64,
    num_heads: int = 8,
    num_tokens: int = 16,
    num_bytes: int = 512,
    padding: int = 0,
) -> Cache:
    """Random bytes, laid out as vLLM lays out a KV cache of this shape."""
    sizes = (num_layers, num_blocks, num_heads, num_tokens, num_bytes)
    order = LAYOUTS[layout]
    strides, step = [0] * 5, 1
    for position, axis in reversed(list(enumerate(order))):
        if position == max(order.index(0), order.index(1)):
            step += padding  # at the end of each page
        strides[axis] = step
        step *= sizes[axis]
    generator = torch.Generator(device=device).manual_seed(seed)
    buffer = torch.randint(0, 256, (step,), dtype=torch.uint8, device=device, generator=generator)
    view = torch.as_strided(buffer, sizes, strides)
    runs = runs_of(
        offset=0,
        sizes=(sizes[0], *sizes[2:]),
        strides=(strides[0], *strides[2:]),
        block_stride=strides[1],
    )
    described = BlockLayout(name=layout, num_blocks=num_blocks, runs=tuple(runs))
    return Cache(views=[view[i] for i in range(num_layers)], blocks=KVBlocks(buffer, described))


KINDS: dict[str, dict[str, int]] = {
    "GQA": {},
    "MLA": {"num_heads": 1, "num_tokens": 64, "num_bytes": 1152},
    "fp8": {"num_bytes": 256},
    "fp8, scales inline": {"num_bytes": 264},
    "padded": {"padding": 1024},
}


def layouts(checks: Checks) -> str:
    """Blocks arrive in every layout, and nothing else changes."""
    num_checked = 0
    for layout in LAYOUTS:
        for kind, shape in KINDS.items():
            if "padding" in shape and layout in ("BHLNC", "LHBNC"):
                continue  # as in vLLM: heads lie outside the page
            source, target = (make_cache(checks.device, s, layout, **shape) for s in (1, 2))
            from_ids, to_ids = [5, 63, 0, 17], [9, 1, 40, 62]
            before = target.blocks.buffer.clone()
            staging = torch.zeros(5 * source.blocks.block_num_bytes, dtype=torch.uint8)
            source.blocks.gather(from_ids, staging)
            target.blocks.scatter(to_ids, staging)
            for from_id, to_id in zip(from_ids, to_ids, strict=True):
                assert target.has(to_id, source.content(from_id)), f"{layout}, {kind}"
            assert not staging[4 * source.blocks.block_num_bytes :].any(), f"{layout}, {kind}"
            # Put back what was there: then the whole buffer must be as it was.
            old = make_cache(checks.device, 2, layout, **shape)
            old.blocks.gather(to_ids, staging)
            target.blocks.scatter(to_ids, staging)
            assert torch.equal(target.blocks.buffer, before), f"{layout}, {kind}: neighbours"
            num_checked += 1
    return f"{num_checked} caches"


def wrong_blocks(checks: Checks) -> str:
    """A block that there is not is refused, before a GPU would end the process's context."""
    kv = make_cache(checks.device, 1).blocks
    staging = torch.zeros(2 * kv.block_num_bytes, dtype=torch.uint8)
    for copy in (kv.gather, kv.scatter):
        for block_id in (-1, 64):
            try:
                copy([0, block_id], staging)
            except IndexError:
                continue
            raise AssertionError(f"block {block_id} was copied")
    return ""


def _digest(content: torch.Tensor) -> str:
    return hashlib.sha256(content.cpu().numpy().data).hexdigest()


def _read_ring(offer: RingOffer, num_bytes: int, device: str, answers: Any) -> None:
    ring = ReceiveRing(offer, pinned=device == "cuda")
    answers.put(_digest(ring.slot(0)[:num_bytes].to(device)))


def staging_memory(checks: Checks) -> str:
    """Another process maps the ring and reads it, both ends locked where CUDA can lock."""
    num_bytes = 1 << 16 if checks.small else 64 << 20
    is_cuda = checks.device.type == "cuda"
    ring = SendRing(num_slots=2, slot_num_bytes=num_bytes, pinned=is_cuda)
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).to(checks.device)
    ring.slot(0).copy_(content)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = (ring.offer(), num_bytes, checks.device.type, answers)
    reader = context.Process(target=_read_ring, args=arguments)
    reader.start()
    assert answers.get(timeout=120) == _digest(content), "other bytes"
    reader.join()
    if is_cuda:
        for name, host in (("ring", ring.slot(0)), ("pageable", torch.empty_like(ring.slot(0)))):
            times_s = [_timed(partial(to.copy_, of, True)) for to, of in _both_ways(host, content)]
            rates = [f"{num_bytes / time_s / BYTES_PER_GB:.1f}" for time_s in times_s]
            checks.say("INFO", f"{name} memory", f"{rates[0]} GB/s out, {rates[1]} GB/s in")
    ring.close()
    return f"{num_bytes >> 10} KiB"


def _both_ways(
    host: torch.Tensor, near: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return (host, near), (near, host)


def shards(checks: Checks) -> str:
    """Each worker of two copies its shard of a block through the engine's slot."""
    caches = [[make_cache(checks.device, 10 * s + r, num_heads=4) for r in (0, 1)] for s in (0, 1)]

    def workers_of(side: Sequence[Cache]) -> Callable[[int, Any], list[ShardOpened]]:
        return lambda pid, pipes: [
            serve_shard([cache.blocks], pid, pipe) for cache, pipe in zip(side, pipes, strict=True)
        ]

    async def copy() -> None:
        source, target = (ShardedKV(workers_of(side), num_workers=2) for side in caches)
        num_bytes = 3 * source.block_num_bytes[0]
        ring = SendRing(num_slots=1, slot_num_bytes=num_bytes)
        staging = ring.staging(0, num_bytes)
        await source.gather(0, [1, 2, 3], staging)
        await target.scatter(0, [7, 8, 9], staging)
        source.close()
        target.close()
        ring.close()

    asyncio.run(copy())
    for theirs, ours in zip(*caches, strict=True):
        assert all(ours.has(b + 6, theirs.content(b)) for b in (1, 2, 3))
    return ""


def generator(checks: Checks) -> str:
    """A seeded generator goes on elsewhere from the state that travels (model runner V1)."""
    one, two = (torch.Generator(device=checks.device) for _ in range(2))
    one.manual_seed(7)
    torch.empty(5, 50_000, device=checks.device).exponential_(generator=one)
    carried = bytes(one.get_state().numpy())
    two.set_state(torch.frombuffer(bytearray(carried), dtype=torch.uint8))
    draws = [
        torch.empty(50_000, device=checks.device).exponential_(generator=g) for g in (one, two)
    ]
    assert torch.equal(*draws)
    return f"{len(carried)} bytes of state"


def beside_a_step(checks: Checks) -> str:
    """A gather does not wait for the step in flight; a scatter after its end is not overwritten."""
    device = checks.needs_cuda
    cache = make_cache(device, 3)
    expected = cache.content(3)
    staging = torch.zeros(2 * cache.blocks.block_num_bytes, dtype=torch.uint8)
    cache.blocks.gather([3, 4], staging)
    cuda: Any = torch.cuda
    step = cuda.Stream(device)
    with cuda.stream(step):
        cuda._sleep(NUM_CYCLES)
        cache.views[0][9].zero_()  # the last write of a request that has ended meanwhile
        over = step.record_event()
    begun_s = time.perf_counter()
    cache.blocks.gather([3, 4], staging)
    took_s = time.perf_counter() - begun_s
    assert not over.query(), "the gather waited for the step"
    over.synchronize()  # blocks are not given out before that, by vLLM's deferred frees
    cache.blocks.scatter([9, 10], staging)
    torch.cuda.synchronize(device)
    assert cache.has(9, expected), "the arrival was overwritten"
    return f"a gather beside a step takes {1000 * took_s:.1f} ms"


def other_threads(checks: Checks) -> str:
    """From a thread that has set neither device nor stream, as a migrator's and a worker's."""
    device = checks.needs_cuda
    cache, raised = make_cache(device, 4), []

    def copy() -> None:
        try:
            staging = torch.zeros(2 * cache.blocks.block_num_bytes, dtype=torch.uint8)
            cache.blocks.gather([1, 2], staging)
            cache.blocks.scatter([11, 12], staging)
            assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert not raised, raised[0]
    assert cache.has(11, cache.content(1))
    return ""


def steps_beside_copies(checks: Checks) -> str:
    """How much slower a step of a CUDA graph gets while blocks leave."""
    device = checks.needs_cuda
    kv = make_cache(device, 5, num_layers=32, num_blocks=512).blocks
    ids = list(range(64_000_000 // kv.block_num_bytes))
    ring = SendRing(num_slots=1, slot_num_bytes=len(ids) * kv.block_num_bytes, pinned=True)
    x, weight = (torch.randn(n, 8192, device=device, dtype=torch.bfloat16) for n in (64, 8192))
    torch.mm(x, weight)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(64):
            torch.mm(x, weight)

    def steps() -> list[float]:
        times_s = []
        for _ in range(200):
            begun_s = time.perf_counter()
            graph.replay()
            torch.cuda.current_stream(device).synchronize()
            times_s.append(time.perf_counter() - begun_s)
        return sorted(times_s)

    steps()
    alone, ended, num_copied = steps(), threading.Event(), 0

    def leave() -> None:
        nonlocal num_copied
        while not ended.is_set():
            kv.gather(ids, ring.slot(0))
            num_copied += 1

    thread = threading.Thread(target=leave)
    begun_s = time.perf_counter()
    thread.start()
    beside = steps()
    rate = num_copied * len(ids) * kv.block_num_bytes / (time.perf_counter() - begun_s)
    ended.set()
    thread.join()
    ring.close()
    medians = [f"{1000 * times[100]:.2f}" for times in (alone, beside)]
    worst = [f"{1000 * times[197]:.2f}" for times in (alone, beside)]
    return (
        f"median {medians[0]} alone, {medians[1]} ms beside; p99 {worst[0]} and {worst[1]} ms; "
        f"{rate / BYTES_PER_GB:.1f} GB/s left"
    )


def speed(num_layers: int) -> Callable[[Checks], str]:
    """Rates of a cache with so many layers of 8 KV heads, in slots of 8 and 64 MB."""

    def check(checks: Checks) -> str:
        kv = make_cache(checks.needs_cuda, 6, num_layers=num_layers, num_blocks=256).blocks
        found = []
        for slot_mb in (8, 64):
            num_blocks = max(1, slot_mb * 1_000_000 // kv.block_num_bytes)
            ids = torch.randperm(256)[:num_blocks].tolist()
            num_bytes = num_blocks * kv.block_num_bytes
            ring = SendRing(num_slots=1, slot_num_bytes=num_bytes, pinned=True)
            near = torch.empty(num_bytes, dtype=torch.uint8, device=kv.device)
            rates = [
                num_bytes / _timed(partial(copy, ids, staging)) / BYTES_PER_GB
                for copy in (kv.gather, kv.scatter)
                for staging in (ring.slot(0), near)
            ]
            found.append(
                f"{slot_mb} MB ({num_blocks} blocks): out {rates[0]:.1f}, in {rates[2]:.1f}, "
                f"inside the GPU {rates[1]:.0f} and {rates[3]:.0f} GB/s"
            )
            ring.close()
        return "; ".join(found)

    return check


def leaks(checks: Checks) -> str:
    """2,000 copies there and back keep memory and descriptors."""
    device = checks.needs_cuda
    kv = make_cache(device, 7).blocks
    staging = torch.zeros(3 * kv.block_num_bytes, dtype=torch.uint8)

    def held() -> tuple[int, int]:
        return torch.cuda.memory_reserved(device), len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = (0, 0)
    for index in range(2000):
        kv.gather([1, 2, 3], staging)
        kv.scatter([4, 5, 6], staging)
        if index == 200:
            before = held()
    assert held() == before
    return ""


def _timed(copy: Callable[[], object], repetitions: int = 10) -> float:
    copy()
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(repetitions):
        copy()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun_s) / repetitions


def migrations(checks: Checks) -> None:
    """Whole moves between two processes, over each transport, then with one that dies."""
    with moves.Pair(checks.device.type) as pair:
        for transport in (AUTO, *TRANSPORTS):
            checks.run(f"a request moves by {transport}", partial(_move, pair, transport))
        for dead, message in DEATHS[:2] if checks.small else DEATHS:
            checks.run(f"instance {dead} dies at {message}", partial(_survive, pair, dead, message))


def _move(pair: moves.Pair, transport: str, _: Checks) -> str:
    if transport == "nccl":
        raise Skipped("it needs a GPU at each end")
    found = pair.move(transport)
    if found.startswith(moves.NOT_MOVED):
        raise Skipped(found.removeprefix(moves.NOT_MOVED))
    return found


def _survive(pair: moves.Pair, dead: str, dies_at: str, _: Checks) -> str:
    return pair.survive(AUTO, dead=dead, dies_at=dies_at)


# Between the stages of a migration from a to b, at each end.
DEATHS = (
    ("b", "StoreBlocks"),
    ("a", "BlocksCopied"),
    ("b", "CommitRequest"),
    ("a", "BlocksReserved"),
    ("a", "CommitAcknowledged"),
)

CHECKS: dict[str, Callable[[Checks], str]] = {
    "blocks in every layout": layouts,
    "a block that there is not": wrong_blocks,
    "staging memory": staging_memory,
    "shards of two workers": shards,
    "a seeded generator": generator,
    "copies beside a step in flight": beside_a_step,
    "copies from other threads": other_threads,
    "a step beside copies": steps_beside_copies,
    "speed, 32 layers": speed(32),
    "speed, 80 layers": speed(80),
    "2,000 copies": leaks,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="little memory, fewer deaths")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu runs what needs none")
    device = torch.device("cuda:0" if parsed.device == "cuda" else "cpu")
    name = torch.cuda.get_device_name(0) if parsed.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    started_s = time.perf_counter()
    checks = Checks(device, parsed.small)
    for title, check in CHECKS.items():
        checks.run(title, check)
    migrations(checks)
    print(f"{checks.num_failed} failed, {time.perf_counter() - started_s:.0f} s")
    return int(checks.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
