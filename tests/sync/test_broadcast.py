"""The C++ broadcaster against its reference, over gloo. Threads are the ranks where a process adds nothing."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xorl.sync.broadcast import BucketBroadcast, GroupHost, ReferenceBroadcast, join_group

_C = pytest.importorskip("xorl._C", reason="the extension is not built: python setup.py build_ext --inplace")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TIMEOUT_S = 20.0
BUCKET_BYTES = 1000
KINDS = ("extension", "reference")


def broadcaster(kind: str) -> type:
    return {"extension": _C.BucketBroadcast, "reference": ReferenceBroadcast}[kind]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    odd = [torch.randn(size, generator=generator) for size in ((), (1,), (7, 3), (0,), (5, 0), (251,), (3, 1000))]
    return [
        *(tensor.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64) for tensor in odd),
        torch.randn(16, 8, generator=generator).T,  # not contiguous
        torch.randn(100, 40, generator=generator).T,  # nor that, and larger than a bucket
        torch.randint(0, 255, (999,), generator=generator, dtype=torch.uint8),
        torch.tensor([True, False, True]),
        torch.nn.Parameter(torch.randn(11, generator=generator)),
        torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn),  # a kind that gloo does not know
    ]


def digest(received: list[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in received:
        whole.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def make_pair(timeout_s: float = TIMEOUT_S) -> tuple[ProcessGroup, ProcessGroup]:
    host = GroupHost("127.0.0.1", 0, timeout_s)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(join_group, "127.0.0.1", host.port, 1, 2, "g", "gloo", timeout_s)
        return host.form(2, "g", "gloo"), other.result()


def send_one(end: BucketBroadcast) -> None:
    end.send(end.slot(1 << 20))
    end.finish()


def on_both(rank_0: Callable[[], object], rank_1: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(rank_1)
        rank_0()
        other.result()


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_arrives_in_another_process_bit_for_bit(kind):
    host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "kernels", "tests"))
    peer = subprocess.Popen(
        [sys.executable, "-m", "sync.peer", str(host.port), str(TIMEOUT_S), kind],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    group = host.form(2, "g", "gloo")
    sent = tensors()
    broadcaster(kind)(group, 0, CPU, TIMEOUT_S).broadcast(sent, BUCKET_BYTES)
    output, _ = peer.communicate(timeout=TIMEOUT_S)
    assert output.strip() == digest(sent) == digest(tensors())


@pytest.mark.parametrize("bucket_bytes", [1, 64, 4096, 1 << 20])
def test_any_bucket_size_gives_the_same(bucket_bytes):
    ends = [_C.BucketBroadcast(group, 0, CPU, TIMEOUT_S) for group in make_pair()]
    received = [torch.zeros_like(tensor) for tensor in tensors()]
    on_both(lambda: ends[0].broadcast(tensors(), bucket_bytes), lambda: ends[1].broadcast(received, bucket_bytes))
    assert digest(received) == digest(tensors())


def test_an_empty_list_sends_nothing_and_another_may_follow():
    ends = [_C.BucketBroadcast(group, 0, CPU, TIMEOUT_S) for group in make_pair()]
    ends[0].broadcast([], BUCKET_BYTES)
    ends[1].broadcast([torch.empty(0)], BUCKET_BYTES)
    value, received = torch.zeros(70), torch.zeros(70)
    for i in range(3):
        value.fill_(i + 1)
        on_both(lambda: ends[0].broadcast([value], 100), lambda: ends[1].broadcast([received], 100))
        assert torch.equal(received, value)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_travel_while_the_next_is_filled(kind):
    """The receiver knows nothing of slots: it takes one flat tensor after the other."""
    group, other = make_pair()
    end = broadcaster(kind)(group, 0, CPU, TIMEOUT_S)
    sizes = [10, 500, 1, 500, 499, 0, 2000, 3]
    received = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def send() -> None:
        for i, size in enumerate(sizes):
            slot = end.slot(size)
            assert (slot.dtype, slot.shape) == (torch.uint8, (size,))
            end.send(slot.fill_(i + 1))
        end.finish()

    on_both(send, lambda: [other.broadcast(flat, 0).wait() for flat in received])
    assert [flat.unique().tolist() for flat in received] == [[i + 1] if size else [] for i, size in enumerate(sizes)]


def test_there_are_two_slots_and_they_stay():
    end = _C.BucketBroadcast(make_pair()[0], 0, CPU, TIMEOUT_S)
    assert end.slot(100).data_ptr() == end.slot(50).data_ptr(), "nothing was sent in between"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_that_nobody_takes_fails_in_time_and_a_new_group_works(kind):
    group, _absent = make_pair()
    end = broadcaster(kind)(group, 0, CPU, 0.3)
    with pytest.raises(RuntimeError):
        send_one(end)
    with pytest.raises(RuntimeError, match="the broadcast failed"):
        end.slot(1)
    ends = [broadcaster(kind)(group, 0, CPU, TIMEOUT_S) for group in make_pair()]
    received = torch.zeros(100)
    on_both(lambda: ends[0].broadcast([torch.ones(100)], 64), lambda: ends[1].broadcast([received], 64))
    assert received.all()


def test_abort_ends_a_wait_at_once():
    group, _absent = make_pair(timeout_s=2.0)
    end = _C.BucketBroadcast(group, 0, CPU, 2.0)
    end.send(end.slot(1 << 20))
    waiting = threading.Timer(0.05, end.abort)
    waiting.start()
    with pytest.raises(RuntimeError, match="it was aborted"):
        end.finish()
    waiting.join()
    with pytest.raises(RuntimeError, match="it was aborted"):
        end.send(torch.zeros(1, dtype=torch.uint8))


def test_a_peer_that_goes_away_is_an_error():
    group, other = make_pair()
    end = _C.BucketBroadcast(group, 0, CPU, TIMEOUT_S)
    end.send(end.slot(1 << 20))
    del other
    with pytest.raises(RuntimeError):
        end.finish()


def test_only_flat_bytes_are_a_bucket():
    end = _C.BucketBroadcast(make_pair()[0], 0, CPU, TIMEOUT_S)
    for wrong in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]):
        with pytest.raises(RuntimeError, match="a bucket is flat uint8"):
            end.send(wrong)
    with pytest.raises(RuntimeError, match="root 2 is not among 2 ranks"):
        _C.BucketBroadcast(make_pair()[0], 2, CPU, TIMEOUT_S)


def test_a_closed_host_ends_the_wait_of_who_has_come():
    host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
    with ThreadPoolExecutor(2) as threads:
        others = [
            threads.submit(host.form, 3, "g", "gloo"),
            threads.submit(join_group, "127.0.0.1", host.port, 1, 3, "g", "gloo", TIMEOUT_S),
        ]
        host.dismiss(num_guests=1)
        for other in others:
            assert isinstance(other.exception(TIMEOUT_S / 2), RuntimeError)


def test_an_unknown_backend_is_refused():
    host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
    with pytest.raises(ValueError, match="backend mpi is not one of gloo, nccl"):
        host.form(1, "g", "mpi")
