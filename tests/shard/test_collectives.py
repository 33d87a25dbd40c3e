"""Collectives between real processes over gloo: right sums, columns in rank order, errors that name what broke off."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from distributed_sparse.shard.collectives import CollectiveError, Collectives
from tests.support.process_group import PRELOAD


def in_ranks(world_size: int, body: Callable[[Collectives], object], timeout: float = 60.0) -> list:
    """What `body` returned, or the text of what it raised, in each of `world_size` processes; None where one died."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends, processes = [], []
    for rank in range(world_size):
        ours, theirs = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=run_rank, args=(rank, world_size, store.port, body, theirs), daemon=True)
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


def run_rank(rank: int, world_size: int, port: int, body: Callable[[Collectives], object], answer) -> None:
    torch.set_num_threads(1)
    try:
        collectives = make(rank, world_size, port)
        answer.send(body(collectives))
        collectives.close()
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
    answer.close()
    os._exit(0)


def make(rank: int, world_size: int, port: int, **arguments) -> Collectives:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    generation = arguments.pop("generation", 0)
    collectives = Collectives(rank, world_size, "cpu", store, **{"timeout": 20.0, **arguments})
    collectives.meet(generation)
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
def test_all_reduce_sums_in_place_in_every_dtype(world_size):
    factor = world_size * (world_size + 1) // 2
    for found in in_ranks(world_size, sums):
        assert list(found) == ["torch.float32", "torch.bfloat16", "torch.float16"]
        for values in found.values():
            assert values == [0.0, *(factor * i for i in range(1, 6))]


def gathered(collectives: Collectives) -> tuple:
    x = torch.arange(6.0).reshape(2, 3) + 10 * collectives.rank
    strided = torch.arange(12.0).reshape(3, 4).t()[:2] + 100 * collectives.rank  # [2, 3], not contiguous
    return collectives.all_gather(x).tolist(), collectives.all_gather(strided).tolist(), collectives.all_gather(x[:0]).shape


def test_all_gather_joins_the_columns_in_rank_order():
    for plain, strided, empty in in_ranks(2, gathered):
        assert plain == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
        assert strided == [[0, 4, 8, 100, 104, 108], [1, 5, 9, 101, 105, 109]]
        assert empty == (0, 6)


def broadcasted(collectives: Collectives) -> list:
    tokens = torch.tensor([7, 1 << 40]) if collectives.rank == 0 else torch.empty(2, dtype=torch.int64)
    collectives.broadcast(tokens)
    return tokens.tolist()


def test_broadcast_gives_every_rank_rank_zeros_tokens():
    assert in_ranks(3, broadcasted) == [[7, 1 << 40]] * 3


def waited(collectives: Collectives) -> float:
    collectives.barrier()
    if collectives.rank == 0:
        time.sleep(0.4)
    began = time.monotonic()
    collectives.barrier()
    return time.monotonic() - began


def test_a_barrier_waits_for_the_last_rank():
    waits = in_ranks(2, waited)
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


def test_calls_and_bytes_are_counted_and_timed_until_they_are_reset():
    assert in_ranks(2, counted) == [((2, 3 * 4 + 15 * 2), ["all_reduce"], (0, 0))] * 2


def leave_the_other_alone(collectives: Collectives) -> str:
    collectives.barrier()
    if collectives.rank == 1:
        os._exit(9)
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="all_reduce on rank 0 of 2 did not complete"):
        collectives.all_reduce(torch.zeros(4))
    assert time.monotonic() - began < 5.0
    return "told"


def test_a_rank_that_dies_breaks_the_others_collective_off_at_once():
    assert in_ranks(2, leave_the_other_alone) == ["told", None]


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
    collectives.meet(1)
    sums = [collectives.all_reduce(torch.ones(1)).item()]
    collectives.meet(2)  # nothing was broken this time
    return [*sums, collectives.all_reduce(torch.ones(1)).item()]


def test_a_group_that_has_broken_is_left_and_the_ranks_meet_again():
    assert in_ranks(2, left_and_met_again) == [[2.0, 2.0]] * 2


def met_in_turn(collectives: Collectives) -> float:
    """Rank 0 still waits for a generation that rank 1 never comes to: it gives up, and joins it in the next."""
    collectives.barrier()
    if collectives.rank == 0:
        collectives._timeout = timedelta(seconds=0.5)
        with pytest.raises(CollectiveError, match="rendezvous on rank 0 of 2"):
            collectives.meet(1)
        collectives._timeout = timedelta(seconds=20.0)
    collectives.meet(2)
    return collectives.all_reduce(torch.ones(1)).item()


def test_a_meeting_that_failed_leaves_nothing_behind_for_the_next_generation():
    assert in_ranks(2, met_in_turn) == [2.0, 2.0]


def test_no_process_group_of_torch_is_made():
    assert in_ranks(2, has_global_group) == [False, False]


def has_global_group(collectives: Collectives) -> bool:
    collectives.barrier()
    return dist.is_initialized()


def test_one_rank_needs_no_group_and_counts_nothing():
    alone = Collectives()
    alone.meet()
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
    from datetime import timedelta

    from distributed_sparse.shard.collectives import nccl_group

    torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    collectives = Collectives(device="cuda")
    collectives._group = nccl_group(dist.PrefixStore("gen0", store), 0, 1, timedelta(seconds=60))
    x = torch.arange(6.0, device="cuda", dtype=torch.bfloat16).reshape(2, 3)
    assert collectives.all_reduce(x.clone()).tolist() == x.tolist()
    assert collectives.all_gather(x).tolist() == x.tolist()
    assert collectives.broadcast(x.clone()).tolist() == x.tolist()
    collectives.barrier()
    assert collectives.all_reduce_bytes == 12
    collectives.close()
