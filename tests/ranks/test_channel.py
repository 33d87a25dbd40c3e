"""A channel carries messages whole and only between peers that know the secret; nobody can keep it waiting."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time

import pytest

from distributed_sparse.protocol.step import (
    Alive,
    AllocateCache,
    DecodeRow,
    Failed,
    LogprobBlock,
    PrefillChunk,
    Ready,
    StepPlan,
    StepResult,
    Stop,
)
from distributed_sparse.ranks import channel as channel_module
from distributed_sparse.ranks.channel import Channel, ChannelClosed, ChannelTimeout, Listener, connect

SECRET = b"a secret of thirty-two bytes ok."


@pytest.fixture
def listener():
    with contextlib.closing(Listener("127.0.0.1", SECRET, handshake_timeout=0.5)) as listener:
        yield listener


def pair(listener: Listener) -> tuple[Channel, Channel]:
    """(driver's end, shard's end) of one new channel."""
    shard: list[Channel] = []
    thread = threading.Thread(target=lambda: shard.append(connect(listener.address, SECRET, 5.0)))
    thread.start()
    driver = listener.accept(5.0)
    thread.join(5.0)
    assert driver is not None and shard
    return driver, shard[0]


@pytest.fixture
def channels(listener):
    driver, shard = pair(listener)
    yield driver, shard
    driver.close()
    shard.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_arrive_whole_in_order_and_both_ways(channels):
    driver, shard = channels
    plan = StepPlan(
        step=3,
        generation=1,
        new_pages=[(0, [4, 5])],
        decode=[DecodeRow(slot=0, position=17, token=None, samples=[0])],
        prefill=[PrefillChunk(slot=1, start=0, tokens=[1, 2, 3], samples=[])],
    )
    driver.send(plan)
    driver.send(Stop())
    assert shard.receive(1.0) == plan
    assert shard.receive(1.0) == Stop()
    shard.send(StepResult(step=3, rank=1, tokens=[9]))
    assert driver.receive(1.0) == StepResult(step=3, rank=1, tokens=[9])


def test_messages_that_two_threads_send_at_once_do_not_mix(channels):
    driver, shard = channels
    block = LogprobBlock(slot=0, position=1, rows=1, width=1, token_ids=b"", logprobs=os.urandom(1 << 18), ranks=b"")
    result = StepResult(step=3, rank=1, prompt_logprobs=[block])
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            shard.send(Alive(0))

    def answer() -> None:
        for _ in range(20):
            shard.send(result)
        done.set()

    threads = [threading.Thread(target=body) for body in (beat, answer)]
    for thread in threads:
        thread.start()
    results: list[StepResult] = []
    while len(results) < 20:
        message = driver.receive(5.0)
        if not isinstance(message, Alive):
            results.append(message)
    assert results == [result] * 20
    for thread in threads:
        thread.join(5.0)


def test_a_message_larger_than_every_buffer_arrives_whole(channels):
    driver, shard = channels
    payload = os.urandom(1 << 20) * 24
    block = LogprobBlock(slot=0, position=1, rows=1, width=1, token_ids=b"", logprobs=payload, ranks=b"")
    sender = threading.Thread(target=shard.send, args=(StepResult(step=1, rank=0, prompt_logprobs=[block]),))
    sender.start()
    received = driver.receive(10.0)
    sender.join()
    assert received.prompt_logprobs[0].logprobs == payload


def test_nagle_is_off_on_both_ends(channels):
    for end in channels:
        assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_wrong_secret_is_refused_on_both_sides_and_the_next_peer_is_served(listener):
    errors: list[Exception] = []

    def knock():
        try:
            connect(listener.address, b"wrong", 5.0)
        except ChannelClosed as error:
            errors.append(error)

    thread = threading.Thread(target=knock)
    thread.start()
    assert listener.accept(0.4) is None
    thread.join(5.0)
    assert errors and "handshake" in str(errors[0])
    for end in pair(listener):
        end.close()


def test_a_shard_does_not_talk_to_a_listener_that_does_not_know_the_secret():
    impostor = Listener("127.0.0.1", b"another secret")
    thread = threading.Thread(target=impostor.accept, args=(1.0,))
    thread.start()
    with pytest.raises(ChannelClosed, match="handshake"):
        connect(impostor.address, SECRET, 5.0)
    thread.join()
    impostor.close()


def test_silent_and_half_way_peers_keep_nobody_waiting_and_are_closed(listener):
    silent = [socket.create_connection(listener.address) for _ in range(4)]
    half = socket.create_connection(listener.address)
    assert listener.accept(0.05) is None
    half.sendall(struct.pack("!i", 16) + b"half")  # a frame of 16 bytes is promised, 4 come
    started = time.monotonic()
    ends = pair(listener)
    assert time.monotonic() - started < 0.4, "a good peer waited for a silent one"
    assert listener.accept(0.9) is None
    for peer in [*silent, half]:
        peer.settimeout(2.0)
        while peer.recv(4096):
            pass  # the challenge, then end of file: the listener has closed it
        peer.close()
    for end in ends:
        end.close()


def test_a_peer_that_trickles_bytes_meets_the_deadline_of_the_whole_handshake(listener):
    peer = socket.create_connection(listener.address)
    started = time.monotonic()
    closed_after = None
    for byte in struct.pack("!i", 200) + bytes(200):
        listener.accept(0.1)
        try:
            peer.sendall(bytes([byte]))
        except OSError:
            closed_after = time.monotonic() - started
            break
    peer.close()
    assert closed_after is not None and closed_after < 2.0


def test_a_promise_of_a_huge_frame_before_the_handshake_is_not_read(listener):
    peer = socket.create_connection(listener.address)
    peer.sendall(struct.pack("!i", 0x7FFFFFFF))
    assert listener.accept(0.3) is None
    peer.settimeout(1.0)
    with contextlib.suppress(ConnectionResetError):
        while peer.recv(4096):
            pass
    peer.close()


def test_more_silent_peers_than_places_push_out_the_oldest(listener, monkeypatch):
    monkeypatch.setattr(channel_module, "MAX_HANDSHAKES", 3)
    silent = [socket.create_connection(listener.address) for _ in range(3)]
    assert listener.accept(0.1) is None
    for end in pair(listener):
        end.close()
    silent[0].settimeout(0.3)
    while silent[0].recv(4096):
        pass
    for peer in silent:
        peer.close()


def test_end_of_file_raises_channel_closed_at_once(channels):
    driver, shard = channels
    shard.close()
    started = time.monotonic()
    with pytest.raises(ChannelClosed):
        driver.receive(5.0)
    assert time.monotonic() - started < 0.5
    with pytest.raises(ChannelClosed):
        driver.send(Stop())


def test_end_of_file_in_the_middle_of_a_message_raises_channel_closed(channels):
    driver, shard = channels
    shard._socket.sendall(struct.pack("!i", 100) + b"only this")
    shard.close()
    with pytest.raises(ChannelClosed):
        driver.receive(5.0)


def test_a_silent_channel_times_out_and_stays_usable(channels):
    driver, shard = channels
    started = time.monotonic()
    with pytest.raises(ChannelTimeout):
        driver.receive(0.2)
    assert 0.15 < time.monotonic() - started < 1.0
    shard.send(Ready(rank=0, cache_bytes=1, metadata_bytes=2))
    assert driver.receive(1.0) == Ready(rank=0, cache_bytes=1, metadata_bytes=2)


def test_waiting_without_a_timeout_outlasts_the_sockets_own(listener, monkeypatch):
    monkeypatch.setattr(channel_module, "STALL_TIMEOUT_S", 0.1)
    driver, shard = pair(listener)
    timer = threading.Timer(0.4, driver.send, args=(AllocateCache(num_pages=7),))
    timer.start()
    assert shard.receive() == AllocateCache(num_pages=7)
    timer.join()
    driver.close()
    shard.close()


def test_a_message_that_stops_half_way_times_out(listener, monkeypatch):
    monkeypatch.setattr(channel_module, "STALL_TIMEOUT_S", 0.2)
    driver, shard = pair(listener)
    shard._socket.sendall(struct.pack("!i", 100) + b"only this")
    with pytest.raises(ChannelTimeout, match="half way"):
        driver.receive(5.0)
    with pytest.raises(ChannelClosed):
        driver.receive(0.1)
    shard.close()


def test_a_peer_that_takes_nothing_ends_the_send(listener, monkeypatch):
    monkeypatch.setattr(channel_module, "SEND_TIMEOUT_S", 0.3)
    driver, shard = pair(listener)
    with pytest.raises(ChannelTimeout, match="read no bytes"):
        driver.send(Failed(rank=0, error="x" * (64 << 20)))
    shard.close()


def test_bytes_that_are_no_message_close_the_channel(channels):
    driver, shard = channels
    shard.send_bytes(b"\xff\x00 nonsense")
    with pytest.raises(ChannelClosed, match="not a valid message"):
        driver.receive(1.0)


def test_a_message_of_the_wrong_direction_is_no_message(channels):
    driver, shard = channels
    shard.send(AllocateCache(num_pages=3))
    with pytest.raises(ChannelClosed, match="not a valid message"):
        driver.receive(1.0)


def test_nobody_listening_is_a_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(ChannelClosed, match=f"127.0.0.1:{address[1]}.*can reach it"):
        connect(address, SECRET, 1.0)


def test_a_listener_that_never_answers_times_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(ChannelTimeout, match="handshake"):
            connect(server.getsockname(), SECRET, 0.3)
        assert time.monotonic() - started < 2.0


def test_closing_leaves_no_descriptor_open():
    before = open_descriptors()
    listener = Listener("127.0.0.1", SECRET)
    silent = socket.create_connection(listener.address)
    ends = pair(listener)
    listener.close()
    for end in [*ends, silent]:
        end.close()
        end.close()
    deadline = time.monotonic() + 2.0
    while open_descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # a handshake's thread may still be on its way out
    assert open_descriptors() == before
