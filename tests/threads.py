"""Ranks as threads of one process, so that tests of what lies above a transport need no launcher."""

import queue
import threading

import numpy as np

from fedsim.transport.transport import Transport


class ThreadTransport(Transport):
    """One rank of a few that share a table of mailboxes."""

    kind = "threads"

    def __init__(self, rank, mail):
        self.rank, self.size, self.moved, self.calls, self.waiting, self.asks = rank, len(mail), 0, 0, False, (0, "")
        self._mail = mail

    def start(self, sends, receives):
        for peer, buffer in sends.items():
            self._mail[peer][self.rank].put(buffer.copy())
            self.moved += buffer.nbytes

        def wait():
            for peer, buffer in receives.items():
                buffer[:] = self._mail[self.rank][peer].get(timeout=60)

        return wait

    def all_gather(self, mine):
        for peer in range(self.size):
            self._mail[peer][self.rank].put(mine.copy())
        return [self._mail[self.rank][peer].get(timeout=60) for peer in range(self.size)]

    def all_to_all(self, sends, lengths, expected):
        ends = np.cumsum(lengths)
        for peer, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            self._mail[peer][self.rank].put(sends[end - length : end].copy())
        parts = [self._mail[self.rank][peer].get(timeout=60) for peer in range(self.size)]
        assert [len(part) for part in parts] == list(expected)
        return np.concatenate(parts)

    def broadcast(self, buffer, root=0):
        return self.all_gather(np.zeros(0, np.uint8) if buffer is None else buffer)[root]


def in_ranks(size, play):
    """Return what `play(transport)` gives on each of `size` ranks; the first mistake is raised here."""
    mail = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]
    found, mistakes = [None] * size, []

    def body(rank):
        try:
            found[rank] = play(ThreadTransport(rank, mail))
        except Exception as error:
            mistakes.append(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if mistakes:
        raise mistakes[0]
    return found
