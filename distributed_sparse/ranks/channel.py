"""Channel: an authenticated TCP connection for messages between the Driver and one shard.

Framing and HMAC handshake are those of the standard library's `multiprocessing.connection`. Only `send_bytes` and
`recv_bytes` are used, so received data is never unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import msgspec

from distributed_sparse.protocol import step as messages

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 10.0
"""Receive timeout within a message, after its first byte."""
MAX_HANDSHAKES = 128
"""Maximum number of concurrent handshakes; beyond it the oldest one is dropped."""
ACCEPT_POLL_S = 0.02

# a wrong digest is an AuthenticationError, a wrong greeting an AssertionError (3.11), a stalled peer a BlockingIOError
HANDSHAKE_ERRORS = (AuthenticationError, AssertionError, EOFError, OSError, ValueError)


class ChannelClosed(ConnectionError):
    """The peer has disconnected, or the channel was closed on this side."""


class ChannelTimeout(TimeoutError):
    """Nothing could be received, or sent, in the time allowed."""


class Channel:
    """Messages over one connection. Several threads may send while another one receives.

    Args:
        connected: a connected, blocking TCP socket after its handshake; the channel owns it.
        decode: decodes a received frame: `messages.decode_from_shard` or `messages.decode_to_shard`.
    """

    def __init__(self, connected: socket.socket, decode: Callable[[bytes], Any]) -> None:
        self._socket = connected
        self._connection = Connection(connected.dup().detach())
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        self._decode = decode
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For `select`: if it is readable, `receive` does not wait for a first byte."""
        return self._connection.fileno()

    @property
    def closed(self) -> bool:
        return self._connection.closed

    def send(self, message: messages.Message) -> None:
        """Send one message.

        Raises:
            ChannelClosed: the peer has disconnected.
            ChannelTimeout: the peer read nothing for 30 s; the channel is closed, since a message was sent in part.
        """
        self.send_bytes(messages.encode(message))

    def send_bytes(self, frame: bytes) -> None:
        """Send an encoded message. Errors: as `send`."""
        try:
            with self._sending:
                self._connection.send_bytes(frame)
        except BlockingIOError:
            self.close()
            raise ChannelTimeout(f"the peer read no bytes for {SEND_TIMEOUT_S:g} s") from None
        except OSError as error:
            self.close()
            raise ChannelClosed(f"the connection was lost while sending ({error})") from None

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Wait up to `timeout` seconds (None: forever) for data; return whether there is any."""
        return bool(self._poll.poll(None if timeout is None else max(timeout, 0.0) * 1e3))

    def receive(self, timeout: float | None = None) -> Any:
        """The next message. `timeout`: seconds to wait for its first byte; None: no limit.

        Raises:
            ChannelClosed: end of file, a reset, or bytes that cannot be decoded.
            ChannelTimeout: nothing was received (the channel stays usable), or a message stopped half way (it is closed).
        """
        # the socket's own timeout applies within a message; `timeout` applies until the first byte
        if not self.poll(timeout):
            raise ChannelTimeout(f"no message in {timeout:g} s")
        try:
            frame = self._connection.recv_bytes()
        except BlockingIOError:
            self.close()
            raise ChannelTimeout(f"a message stopped half way for {STALL_TIMEOUT_S:g} s") from None
        except (EOFError, OSError) as error:
            self.close()
            raise ChannelClosed(f"the peer closed the connection ({str(error) or 'end of file'})") from None
        try:
            return self._decode(frame)
        except msgspec.MsgspecError as error:
            self.close()
            raise ChannelClosed(f"the peer sent {len(frame)} bytes that are not a valid message ({error})") from None

    def close(self) -> None:
        """Close both directions; a waiting peer reads end of file. May be called again."""
        _shut_down(self._socket)
        self._connection.close()


class Listener:
    """Accepts authenticated peers on a new port; drops unauthenticated and silent ones.

    Each handshake runs in its own thread with its own deadline, so a silent peer delays nobody.

    Args:
        host: the only address to listen on.
        secret: the shared key of the HMAC handshake.
        decode: passed to every accepted `Channel`.
        handshake_timeout: seconds that one peer has for the whole handshake.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        decode: Callable[[bytes], Any] = messages.decode_from_shard,
        handshake_timeout: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self._secret = secret
        self._decode = decode
        self._handshake_timeout = handshake_timeout
        self._handshakes: dict[socket.socket, float] = {}
        self._accepted: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._server = socket.create_server((host, 0), family=address_family(host), backlog=MAX_HANDSHAKES)
        self._server.setblocking(False)
        self.address: tuple[str, int] = self._server.getsockname()[:2]

    def accept(self, timeout: float) -> Channel | None:
        """The next authenticated peer, or None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._accepted.get_nowait()
            except queue.Empty:
                pass
            self._end_overdue_handshakes()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            if select.select([self._server], [], [], min(ACCEPT_POLL_S, remaining))[0]:
                self._begin_handshake()

    def close(self) -> None:
        """Close the port, pending handshakes, and channels not yet returned by `accept`. May be called again."""
        with self._lock:
            self._closed = True
            pending = list(self._handshakes)
        self._server.close()
        for peer in pending:
            _shut_down(peer)
        while True:
            try:
                self._accepted.get_nowait().close()
            except queue.Empty:
                return

    def _begin_handshake(self) -> None:
        try:
            peer, address = self._server.accept()
        except OSError:
            return  # the peer has disconnected
        with self._lock:
            oldest = next(iter(self._handshakes)) if len(self._handshakes) >= MAX_HANDSHAKES else None
            self._handshakes[peer] = time.monotonic() + self._handshake_timeout
        if oldest is not None:
            _shut_down(oldest, close=False)
        threading.Thread(target=self._handshake, args=(peer, address), name="handshake", daemon=True).start()

    def _end_overdue_handshakes(self) -> None:
        """A peer that sends single bytes slowly never hits the socket timeout, so the whole handshake has a deadline."""
        now = time.monotonic()
        with self._lock:
            overdue = [peer for peer, deadline in self._handshakes.items() if deadline < now]
        for peer in overdue:
            _shut_down(peer, close=False)

    def _handshake(self, peer: socket.socket, address: tuple) -> None:
        channel = None
        try:
            channel = _authenticated(peer, self._secret, self._decode, self._handshake_timeout, server=True)
        except HANDSHAKE_ERRORS as error:
            logger.warning("refused a peer at %s: %s", address, str(error) or type(error).__name__)
        with self._lock:
            del self._handshakes[peer]
            if channel is not None and not self._closed:
                self._accepted.put(channel)
                return
        if channel is not None:
            channel.close()
        _shut_down(peer)


def connect(
    address: tuple[str, int],
    secret: bytes,
    timeout: float,
    decode: Callable[[bytes], Any] = messages.decode_to_shard,
) -> Channel:
    """Connect to a `Listener` and authenticate with `secret`. `timeout`: seconds for both together.

    Raises:
        ChannelTimeout: no connection, or the handshake took too long.
        ChannelClosed: the connection was refused, or one side's secret is wrong.
    """
    where = f"{address[0]}:{address[1]}"
    deadline = time.monotonic() + timeout
    try:
        peer = socket.create_connection(address, timeout)
    except TimeoutError:
        raise ChannelTimeout(f"no connection to {where} in {timeout:g} s; check that this node can reach it") from None
    except OSError as error:
        raise ChannelClosed(f"no connection to {where} ({error}); check that this node can reach it") from None
    try:
        peer.setblocking(True)
        return _authenticated(peer, secret, decode, max(deadline - time.monotonic(), 0.001), server=False)
    except BlockingIOError:
        _shut_down(peer)
        raise ChannelTimeout(f"the handshake with {where} took more than {timeout:g} s") from None
    except HANDSHAKE_ERRORS as error:
        _shut_down(peer)
        raise ChannelClosed(f"the handshake with {where} failed ({str(error) or 'end of file'})") from None


def _authenticated(
    peer: socket.socket, secret: bytes, decode: Callable[[bytes], Any], timeout: float, *, server: bool
) -> Channel:
    """Run the mutual handshake, then set the channel's socket options. The caller closes `peer` on error."""
    peer.setblocking(True)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # a lost node sends no end of file: without keepalive an idle shard would wait for its Driver forever
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _set_timeouts(peer, timeout, timeout)
    channel = Channel(peer, decode)
    try:
        for challenge in (deliver_challenge, answer_challenge) if server else (answer_challenge, deliver_challenge):
            challenge(channel._connection, secret)
        _set_timeouts(peer, STALL_TIMEOUT_S, SEND_TIMEOUT_S)
    except BaseException:
        channel.close()
        raise
    return channel


def _set_timeouts(peer: socket.socket, receive_s: float, send_s: float) -> None:
    """Set the kernel's timeouts: `settimeout` would make the descriptor non-blocking, which `Connection` cannot use."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        microseconds = max(int(seconds * 1e6), 1)  # zero means no timeout
        peer.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *divmod(microseconds, 1_000_000)))


def _shut_down(peer: socket.socket, close: bool = True) -> None:
    """Wake threads that read or write; `close=False` leaves the descriptor open for the thread that still uses it."""
    with contextlib.suppress(OSError):  # it may be disconnected already
        peer.shutdown(socket.SHUT_RDWR)
    if close:
        peer.close()


def address_family(host: str) -> socket.AddressFamily:
    """The family of a numeric address, for `socket.create_server`."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
