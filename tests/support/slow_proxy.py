"""A proxy between NBD clients and a unix socket that delays every byte, and has a bounded number of bytes per connection and
direction on their way, as a long line does."""

import collections
import os
import selectors
import socket
import threading
import time

PIECE = 1 << 18


class Direction:
    """From one socket to another one."""

    def __init__(self, source, target, delay, window):
        self.source, self.target, self.delay, self.window = source, target, delay, window
        self.queue = collections.deque()  # (when it arrives, bytes)
        self.held = 0
        self.ended = self.finished = False

    def wants_read(self):
        # No crumbs: they would cost this program more time than the line takes.
        return not self.ended and self.held <= self.window * 3 // 4

    def receive(self, now):
        try:
            data = self.source.recv(min(self.window - self.held, PIECE))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.ended = not data
        self.queue.append((now + self.delay, data))
        self.held += len(data)

    def send(self, now):
        while self.queue and self.queue[0][0] <= now:
            when, data = self.queue[0]
            try:
                if not data:
                    self.finished = True
                    self.target.shutdown(socket.SHUT_WR)
                sent = self.target.send(data) if data else 0
            except BlockingIOError:
                return
            except OSError:
                self.queue.clear()
                self.ended = self.finished = True
                return
            self.held -= sent
            if sent == len(data):
                self.queue.popleft()
            else:
                self.queue[0] = (when, memoryview(data)[sent:])


class SlowProxy:
    """Listens on `path`; one thread for all connections."""

    def __init__(self, path, server, delay=0.005, window=1 << 20):
        self.path, self.server, self.delay, self.window = path, server, delay, window
        self.connections = 0
        self.directions = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.wake_up, self.woken = socket.socketpair()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def close(self):
        self.wake_up.close()
        self.thread.join()
        self.woken.close()
        self.listener.close()
        os.unlink(self.path)

    def _accept(self):
        client, _ = self.listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.server)
        for one in (client, server):
            one.setblocking(False)
            # What lies in the kernel's buffers is on its way, too: little of it.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.directions.append(Direction(client, server, self.delay, self.window))
        self.directions.append(Direction(server, client, self.delay, self.window))
        self.connections += 1

    def _interest(self, now):
        """{socket: events}, and when the next byte arrives."""
        events, next_arrival = collections.defaultdict(int), None
        for d in self.directions:
            if d.wants_read():
                events[d.source] |= selectors.EVENT_READ
            if d.queue and d.queue[0][0] <= now:
                events[d.target] |= selectors.EVENT_WRITE
            elif d.queue:
                next_arrival = min(next_arrival or d.queue[0][0], d.queue[0][0])
        return events, next_arrival

    def _run(self):
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        selector.register(self.woken, selectors.EVENT_READ)
        known = {}
        while True:
            now = time.monotonic()
            events, next_arrival = self._interest(now)
            for one in known.keys() - events.keys():
                selector.unregister(one)
            for one, wanted in events.items():
                if one not in known:
                    selector.register(one, wanted)
                elif known[one] != wanted:
                    selector.modify(one, wanted)
            known = events
            ready = {key.fileobj: got for key, got in selector.select(None if next_arrival is None else max(next_arrival - now, 0))}
            if self.woken in ready:
                break
            if self.listener in ready:
                self._accept()
            now = time.monotonic()
            for d in self.directions:
                if ready.get(d.source, 0) & selectors.EVENT_READ and d.wants_read():
                    d.receive(now)
                d.send(now)
            self._forget(known, selector)
        selector.close()
        for d in self.directions:
            d.source.close()

    def _forget(self, known, selector):
        """Connections that have ended in both directions."""
        for one, back in list(zip(self.directions[::2], self.directions[1::2])):
            if one.finished and back.finished:
                for end in (one.source, one.target):
                    if known.pop(end, None):
                        selector.unregister(end)
                    end.close()
                self.directions.remove(one)
                self.directions.remove(back)
