"""The receiving process of a broadcast: `peer.py PORT TIMEOUT_S KIND`; prints a digest of what came."""

import sys

import torch

from sync.test_broadcast import BUCKET_BYTES, broadcaster, digest, tensors
from xorl.sync.broadcast import join_group

if __name__ == "__main__":
    port, timeout_s, kind = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    group = join_group("127.0.0.1", port, 1, 2, "g", "gloo", timeout_s)
    received = [torch.zeros_like(tensor) for tensor in tensors()]
    broadcaster(kind)(group, 0, torch.device("cpu"), timeout_s).broadcast(received, BUCKET_BYTES)
    print(digest(received))
