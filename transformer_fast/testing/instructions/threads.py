"""Threads, warps, blocks, and what passes between them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from transformer_fast.testing.instructions.bench import Bench, Comparison, check


@check("who")
def _who(bench: Bench, name: str) -> Iterator[Comparison]:
    out = bench.empty(6, 96, 9)
    bench.run(name, [], [out])
    expected = [
        [[t, t % 32, t // 32, block % 3, block // 3, 3, 2, 12 * t + 5, 0] for t in range(96)] for block in range(6)
    ]
    yield Comparison("thread, lane, warp, block, blocks, address", out, torch.tensor(expected, dtype=torch.int32))


@check("shuffles")
def _shuffles(bench: Bench, name: str) -> Iterator[Comparison]:
    for mask in (0, 1, 2, 4, 8, 16, 21, 31):
        lane = int(bench.integers(0, 31, ()))
        real, whole = torch.randn(64, generator=bench.generator), bench.integers(-(2**31), 2**31 - 1, (64,))
        reals, wholes = bench.empty(64, 2, dtype=torch.float32), bench.empty(64, 2)
        bench.run(name, [real, whole], [reals, wholes], [mask, lane])
        for kind, x, out in (("float", real, reals), ("int", whole, wholes)):
            expected = torch.empty_like(x.repeat(2)).reshape(64, 2)
            for thread in range(64):
                first_of_warp, own = thread // 32 * 32, thread % 32
                expected[thread, 0] = x[first_of_warp + (own ^ mask)]
                expected[thread, 1] = x[first_of_warp + lane]
            yield Comparison(f"{kind}, mask {mask}, from lane {lane}", out, expected)


@check("votes")
def _votes(bench: Bench, name: str) -> Iterator[Comparison]:
    for turn in range(4):
        value = torch.zeros(4, 32, dtype=torch.int32)
        value[1] = 1
        value[2, int(bench.integers(0, 31, ()))] = 1
        value[3] = 1
        value[3, int(bench.integers(0, 31, ()))] = 0
        value = value[bench.permutation(4)]
        out = bench.empty(4, 32, 2)
        bench.run(name, [value], [out])
        expected = torch.empty(4, 32, 2, dtype=torch.int32)
        for warp in range(4):
            lanes = value[warp].tolist()
            expected[warp, :, 0], expected[warp, :, 1] = int(1 in lanes), int(0 not in lanes)
        yield Comparison(f"turn {turn}: any, all", out, expected)


@check("elect")
def _elect(bench: Bench, name: str) -> Iterator[Comparison]:
    # Which lane is not said ("elect.sync": deterministic, the same leader for the same member mask), but it is one, and
    # the same one each time.
    out = bench.empty(3, 32)
    bench.run(name, [], [out], [5])
    expected = torch.tensor([[5] + [0] * 31] * 3, dtype=torch.int32)
    yield Comparison("times, in order of how many", out.cpu().sort(dim=1, descending=True).values, expected)


@check("syncs")
def _syncs(bench: Bench, name: str) -> Iterator[Comparison]:
    x = bench.integers(-(2**31), 2**31 - 1, (128,))
    in_warp, in_block = bench.empty(128), bench.empty(128)
    bench.run(name, [x], [in_warp, in_block])
    yield Comparison("after sync_warp", in_warp, torch.stack([x[t // 32 * 32 + 31 - t % 32] for t in range(128)]))
    yield Comparison("after sync_threads", in_block, torch.stack([x[127 - t] for t in range(128)]))


@check("barriers")
def _barriers(bench: Bench, name: str) -> Iterator[Comparison]:
    rounds = 5
    x = bench.integers(-(2**20), 2**20, (rounds, 32))
    seen, swapped = bench.empty(rounds, 128), bench.empty(128)
    bench.run(name, [x], [seen, swapped], [rounds])
    expected = torch.empty(rounds, 96, dtype=torch.int32)
    for i in range(rounds):
        for thread in range(96):
            expected[i, thread] = x[i, 31 - thread % 32]
    yield Comparison("what the readers saw", seen.cpu()[:, 32:], expected)
    partner = [thread + 64 if thread < 64 else thread - 64 for thread in range(128)]
    yield Comparison("swapped", swapped, torch.stack([x[0, p % 32] + p for p in partner]).to(torch.int32))


@check("phases")
def _phases(bench: Bench, name: str) -> Iterator[Comparison]:
    for writers in (1, 2, 32, 33, 127, 128):
        rounds = 7
        x = bench.integers(-1000, 1000, (rounds, writers))
        out = bench.empty(rounds, 128)
        bench.run(name, [x], [out], [writers, rounds])
        expected = [[sum(x[i].tolist()) * (thread + 1) for thread in range(128)] for i in range(rounds)]
        yield Comparison(f"{writers} arrivals a phase", out, torch.tensor(expected, dtype=torch.int32))


@check("registers")
def _registers(bench: Bench, name: str) -> Iterator[Comparison]:
    turns = 9
    x = bench.integers(-8, 8, (128,), torch.float32)
    out = bench.empty(384, dtype=torch.float32)
    bench.run(name, [x], [out], [turns])
    expected = x.tolist()
    sums = []
    for add in range(4):
        held = x.tolist()
        for _ in range(turns):
            held = [value + add for value in held[1:]] + held[:1]
        sums.append(sum(i * value for i, value in enumerate(held)))
    expected += [sums[thread % 4] for thread in range(128, 384)]
    yield Comparison("sums over the registers", out, torch.tensor(expected))


@check("atomics")
def _atomics(bench: Bench, name: str) -> Iterator[Comparison]:
    x = bench.integers(-1000, 1000, (256,), torch.float32)
    sums, counter = torch.zeros(8, device=bench.device), bench.empty(257)
    counter[0] = 0
    bench.run(name, [x], [sums, counter])
    yield Comparison("sums", sums, torch.tensor([float(sum(x[i::8].tolist())) for i in range(8)]))
    yield Comparison("the counter", counter[:1], torch.tensor([256], dtype=torch.int32))
    yield Comparison("each number once", counter.cpu()[1:].sort().values, torch.arange(256, dtype=torch.int32))


@check("turns")
def _turns(bench: Bench, name: str) -> Iterator[Comparison]:
    x, begin = bench.integers(-1000, 1000, (4, 64)), bench.integers(-1000, 1000, (64,))
    out, turn = begin.to(bench.device, copy=True), torch.zeros(1, dtype=torch.int32, device=bench.device)
    bench.run(name, [x], [out, turn])
    expected = begin.tolist()
    for block in range(4):
        for thread in range(64):
            place = thread if block % 2 == 0 else 63 - thread
            expected[place] = expected[place] * 3 + int(x[block, thread])
    yield Comparison("one block after the other", out, torch.tensor(expected, dtype=torch.int32))
    yield Comparison("whose turn it is", turn, torch.tensor([4], dtype=torch.int32))


@check("last_block")
def _last_block(bench: Bench, name: str) -> Iterator[Comparison]:
    x = bench.integers(-1000, 1000, (4, 64))
    out, come = bench.empty(5, 64), torch.zeros(1, dtype=torch.int32, device=bench.device)
    bench.run(name, [x], [out, come])
    sums = [sum(x[:, (thread + 1) % 64].tolist()) for thread in range(64)]
    yield Comparison("parts and sums", out, torch.cat([x, torch.tensor([sums], dtype=torch.int32)]))
