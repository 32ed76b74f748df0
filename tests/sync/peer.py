"""Another process of a broadcast: `peer.py PORT RANK WORLD_SIZE TIMEOUT_S` and what it does.

`KIND LIST`: receive that list and print a digest of it.
`fall NUM_BYTES COUNT SIGNAL`: take COUNT buckets of that many bytes, and then that signal.
"""

import os
import sys

import torch

from sync.test_broadcast import BUCKET_BYTES, LISTS, broadcaster, digest
from xorl.sync.broadcast import join_group

if __name__ == "__main__":
    port, rank, world_size, timeout_s, *what = sys.argv[1:]
    group = join_group("127.0.0.1", int(port), int(rank), int(world_size), "g", "gloo", float(timeout_s))
    match what:
        case "fall", num_bytes, count, number:
            for _ in range(int(count)):
                group.broadcast(torch.empty(int(num_bytes), dtype=torch.uint8), 0).wait()
            os.kill(os.getpid(), int(number))
        case kind, which:
            received = [torch.zeros_like(tensor) for tensor in LISTS[which]()]
            broadcaster(kind)(group, 0, torch.device("cpu"), float(timeout_s)).broadcast(received, BUCKET_BYTES)
            print(digest(received))
