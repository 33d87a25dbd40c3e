"""Collectives between real processes, over gloo and shared memory: right sums, columns in order, errors that say what broke."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distributed_sparse.shard.collectives import shared_memory
from distributed_sparse.shard.collectives.collectives import CollectiveError, Collectives
from distributed_sparse.shard.collectives.shared_memory import CAPACITY
from tests.support.patience import WAIT_S
from tests.support.process_group import PRELOAD


@pytest.fixture(params=["shared memory", "gloo"])
def way(request: pytest.FixtureRequest) -> str:
    """How the ranks of `in_ranks` pass small tensors to each other."""
    return request.param


def in_ranks(
    world_size: int, body: Callable[[Collectives], object], timeout: float = WAIT_S, way: str = "shared memory"
) -> list:
    """What `body` returned, or the text of what it raised, in each of `world_size` processes; None where one died."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends, processes = [], []
    for rank in range(world_size):
        ours, theirs = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=run_rank, args=(rank, world_size, store.port, body, theirs, way), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    answers = []
    for end in ends:
        assert end.poll(timeout), "a rank did not answer"
        try:
            answers.append(end.recv())
        except EOFError:
            answers.append(None)
    for process in processes:
        process.kill()
        process.join()
    return answers


def run_rank(rank: int, world_size: int, port: int, body: Callable[[Collectives], object], answer, way: str) -> None:
    torch.set_num_threads(1)
    if way == "gloo" or (way == "one rank cannot" and rank == 1):
        os.environ["DISTRIBUTED_SPARSE_NATIVE"] = "0"
    if way == "one rank has no memory" and rank == 1:
        shared_memory.mmap = SimpleNamespace(mmap=no_memory)
    try:
        collectives = make(rank, world_size, port)
        assert (collectives._shared is not None) == (way == "shared memory")
        answer.send(body(collectives))
        collectives.close()
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
    answer.close()
    os._exit(0)


def no_memory(*arguments) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def make(rank: int, world_size: int, port: int, **arguments) -> Collectives:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    generation = arguments.pop("generation", 0)
    collectives = Collectives(rank, world_size, "cpu", store, **{"timeout": 20.0, **arguments})
    collectives.rendezvous(generation)
    return collectives


def sums(collectives: Collectives) -> dict[str, list[float]]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.arange(6, dtype=dtype).reshape(2, 3) * (collectives.rank + 1)
        y = collectives.all_reduce(x)
        assert y is x, "the sum is made in place"
        found[str(dtype)] = x.flatten().tolist()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_sums_in_place_in_every_dtype(world_size, way):
    factor = world_size * (world_size + 1) // 2
    for found in in_ranks(world_size, sums, way=way):
        assert list(found) == ["torch.float32", "torch.bfloat16", "torch.float16"]
        for values in found.values():
            assert values == [0.0, *(factor * i for i in range(1, 6))]


def gathered(collectives: Collectives) -> tuple:
    x = torch.arange(6.0).reshape(2, 3) + 10 * collectives.rank
    strided = torch.arange(12.0).reshape(3, 4).t()[:2] + 100 * collectives.rank  # [2, 3], not contiguous
    return collectives.all_gather(x).tolist(), collectives.all_gather(strided).tolist(), collectives.all_gather(x[:0]).shape


def test_all_gather_joins_the_columns_in_rank_order(way):
    for plain, strided, empty in in_ranks(2, gathered, way=way):
        assert plain == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
        assert strided == [[0, 4, 8, 100, 104, 108], [1, 5, 9, 101, 105, 109]]
        assert empty == (0, 6)


def broadcasted(collectives: Collectives) -> list:
    tokens = torch.tensor([7, 1 << 40]) if collectives.rank == 0 else torch.empty(2, dtype=torch.int64)
    collectives.broadcast(tokens)
    return tokens.tolist()


def test_broadcast_gives_every_rank_rank_zeros_tokens(way):
    assert in_ranks(3, broadcasted, way=way) == [[7, 1 << 40]] * 3


def waited(collectives: Collectives) -> float:
    collectives.barrier()
    if collectives.rank == 0:
        time.sleep(0.4)
    began = time.monotonic()
    collectives.barrier()
    return time.monotonic() - began


def test_a_barrier_waits_for_the_last_rank(way):
    waits = in_ranks(2, waited, way=way)
    assert waits[1] > 0.3 > waits[0]


def counted(collectives: Collectives) -> tuple:
    parts = []

    @contextmanager
    def timer(part: str):
        parts.append(part)
        yield

    collectives.all_reduce(torch.zeros(3))
    collectives.timer = timer
    collectives.all_reduce(torch.zeros(3, 5, dtype=torch.bfloat16))
    collectives.broadcast(torch.zeros(1))
    counts = collectives.all_reduce_calls, collectives.all_reduce_bytes
    collectives.reset_counts()
    return counts, parts, (collectives.all_reduce_calls, collectives.all_reduce_bytes)


def test_calls_and_bytes_are_counted_and_timed_until_they_are_reset(way):
    assert in_ranks(2, counted, way=way) == [((2, 3 * 4 + 15 * 2), ["all_reduce"], (0, 0))] * 2


def leave_the_other_alone(collectives: Collectives) -> str:
    collectives.barrier()
    if collectives.rank == 1:
        os._exit(9)
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="all_reduce on rank 0 of 2 did not complete"):
        collectives.all_reduce(torch.zeros(4))
    assert time.monotonic() - began < 5.0
    return "told"


def test_a_rank_that_dies_breaks_the_others_collective_off_at_once(way):
    assert in_ranks(2, leave_the_other_alone, way=way) == ["told", None]


def test_ranks_that_never_meet_give_up_in_time():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="rendezvous on rank 0 of 2"):
        make(0, 2, store.port, timeout=0.5)
    assert time.monotonic() - began < 5.0


def two_generations(collectives: Collectives, port: int) -> list[float]:
    """A second group at the same store, while the first is still in use."""
    second = make(collectives.rank, 2, port, generation=1)
    found = [second.all_reduce(torch.ones(1)).item(), collectives.all_reduce(torch.ones(1)).item()]
    second.close()
    second.close()
    return found


def test_a_new_generation_meets_at_the_same_store():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert in_ranks(2, partial(two_generations, port=store.port)) == [[2.0, 2.0]] * 2


def left_and_met_again(collectives: Collectives) -> list:
    """Rank 1 leaves without a word; rank 0 notices; both meet again."""
    collectives.barrier()
    if collectives.rank == 1:
        collectives.close()
    else:
        with pytest.raises(CollectiveError, match="all_reduce on rank 0 of 2 did not complete"):
            collectives.all_reduce(torch.ones(1))
    collectives.rendezvous(1)
    sums = [collectives.all_reduce(torch.ones(1)).item()]
    collectives.rendezvous(2)  # nothing was broken this time
    return [*sums, collectives.all_reduce(torch.ones(1)).item()]


def test_a_group_that_has_broken_is_left_and_the_ranks_meet_again(way):
    assert in_ranks(2, left_and_met_again, way=way) == [[2.0, 2.0]] * 2


def met_in_turn(collectives: Collectives) -> float:
    """Rank 0 still waits for a generation that rank 1 never comes to: it gives up, and joins it in the next."""
    collectives.barrier()
    if collectives.rank == 0:
        collectives._timeout = timedelta(seconds=0.5)
        with pytest.raises(CollectiveError, match="rendezvous on rank 0 of 2"):
            collectives.rendezvous(1)
        collectives._timeout = timedelta(seconds=20.0)
    collectives.rendezvous(2)
    return collectives.all_reduce(torch.ones(1)).item()


def test_a_meeting_that_failed_leaves_nothing_behind_for_the_next_generation(way):
    assert in_ranks(2, met_in_turn, way=way) == [2.0, 2.0]


@pytest.mark.parametrize("way", ["one rank cannot", "one rank has no memory"])
def test_one_rank_that_cannot_share_memory_makes_all_of_them_talk_over_gloo(way):
    for found in in_ranks(2, sums, way=way):
        assert found["torch.float32"] == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]


def of_sizes(collectives: Collectives) -> list[bool]:
    """Around what fits, twice over, so that buffers are used again."""
    right = []
    for extra in (-1, 0, 1, 0, 1, -1):
        n = CAPACITY // 4 + extra
        x = torch.arange(n, dtype=torch.float32) * (collectives.rank + 1)
        right.append(torch.equal(collectives.all_reduce(x), torch.arange(n, dtype=torch.float32) * 3))
    return right


def test_a_tensor_too_large_for_the_memory_takes_the_other_way():
    assert in_ranks(2, of_sizes) == [[True] * 6] * 2


def many(collectives: Collectives) -> bool:
    """Ranks that run apart by chance: nobody's tensor may be overwritten before all have read it."""
    chance = torch.Generator().manual_seed(collectives.rank)
    for i in range(3000):
        x = torch.full((64,), float(i + collectives.rank))
        if torch.rand((), generator=chance) < 0.02:
            time.sleep(0.001)
        if not (collectives.all_reduce(x) == 3 * i + 3).all():
            return False
    return True


def test_no_tensor_is_overwritten_before_all_ranks_have_read_it():
    assert in_ranks(3, many) == [True] * 3


def one_does_not_come(collectives: Collectives) -> str:
    collectives.barrier()
    if collectives.rank == 1:
        time.sleep(1.5)
        return "late"
    collectives._shared.timeout = timedelta(seconds=0.3)
    began = time.monotonic()
    with pytest.raises(CollectiveError, match=r"all_reduce on rank 0 .*: .*rank 1 did not arrive within 0.3 s"):
        collectives.all_reduce(torch.zeros(4))
    assert 0.3 <= time.monotonic() - began < 1.2
    return "told"


def test_a_rank_that_does_not_come_in_time_is_named():
    assert in_ranks(2, one_does_not_come) == ["told", "late"]


def left_while_a_view_lives(collectives: Collectives) -> str:
    collectives.barrier()
    if collectives.rank == 1:
        held = collectives._shared.exchange(torch.zeros(1))
        collectives.close()
        time.sleep(1.0)
        return f"holds {len(held)}"
    collectives._shared.exchange(torch.zeros(1))
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="rank 1 has left"):
        collectives.all_reduce(torch.ones(1))
    assert time.monotonic() - began < 0.9
    return "told"


def test_a_rank_has_left_though_it_still_holds_a_tensor_of_the_memory():
    assert in_ranks(2, left_while_a_view_lives) == ["told", "holds 2"]


def files_held(collectives: Collectives) -> list[str]:
    collectives.barrier()
    collectives.close()
    gc.collect()
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    return [
        *(name for name in held if "distributed_sparse" in name),
        *re.findall("memfd:distributed_sparse", Path("/proc/self/maps").read_text()),
    ]


def test_what_is_left_holds_neither_a_file_nor_memory():
    assert in_ranks(2, files_held) == [[], []]


def test_a_ticket_of_another_machine_opens_nothing():
    file, ticket = shared_memory.create(2)
    try:
        attached = shared_memory.attach(ticket)
        assert attached is not None
        os.close(attached)
        assert shared_memory.attach(bytes(32) + ticket[32:]) is None, "the same name, another memory"
        assert shared_memory.attach(ticket[:32] + b"/proc/self/fd/99999") is None
        assert shared_memory.attach(b"") is None
    finally:
        os.close(file)


def test_no_process_group_of_torch_is_made():
    assert in_ranks(2, has_global_group) == [False, False]


def has_global_group(collectives: Collectives) -> bool:
    collectives.barrier()
    return dist.is_initialized()


def test_one_rank_needs_no_group_and_counts_nothing():
    alone = Collectives()
    alone.rendezvous()
    x = torch.arange(4.0).reshape(2, 2)
    assert alone.all_reduce(x) is x and alone.all_gather(x) is x and alone.broadcast(x) is x
    assert x.tolist() == [[0, 1], [2, 3]]
    alone.barrier()
    assert (alone.all_reduce_calls, alone.all_reduce_bytes) == (0, 0)
    alone.close()


@pytest.mark.gpu
def test_nccl_sums_gathers_and_broadcasts_on_its_device():
    """NCCL refuses two ranks on one GPU, so this is one rank through the real NCCL calls."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from distributed_sparse.shard.collectives.transports import ProcessGroup

    torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    collectives = Collectives(device="cuda")
    collectives._group = ProcessGroup.nccl(dist.PrefixStore("gen0", store), 0, 1, timedelta(seconds=60))
    x = torch.arange(6.0, device="cuda", dtype=torch.bfloat16).reshape(2, 3)
    assert collectives.all_reduce(x.clone()).tolist() == x.tolist()
    assert collectives.all_gather(x).tolist() == x.tolist()
    assert collectives.broadcast(x.clone()).tolist() == x.tolist()
    collectives.barrier()
    assert collectives.all_reduce_bytes == 12
    collectives.close()
