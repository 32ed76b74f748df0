"""The C++ broadcaster against its reference, over gloo. Threads are the ranks where a process adds nothing."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

import xorl
from xorl.sync.broadcast import BucketBroadcast, GroupHost, ReferenceBroadcast, join_group

_C = pytest.importorskip("xorl._C", reason="the extension is not built: python setup.py build_ext --inplace")

PATHS = [str(Path(xorl.__path__[0]).parent), *(str(Path(__file__).parents[2] / name) for name in ("kernels", "tests"))]
"""Of the processes that we start: the xorl that is tested, which `make sanitize` builds elsewhere."""

CPU = torch.device("cpu")
TIMEOUT_S = 20.0
BUCKET_BYTES = 1000
KINDS = ("extension", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn)
MANY = 3000


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


def many_tensors() -> list[Tensor]:
    """Of every dtype, of odd sizes up to 300 items; a few are a multiple of a bucket."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(300, (MANY,), generator=generator).tolist()
    sizes[:: MANY // 5] = [2001] * len(sizes[:: MANY // 5])
    return [torch.randint(2, (size,), generator=generator).to(DTYPES[i % len(DTYPES)]) for i, size in enumerate(sizes)]


LISTS: dict[str, Callable[[], list[Tensor]]] = {"odd": tensors, "many": many_tensors}


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


@contextmanager
def peer(port: int, rank: int, world_size: int, *what: str) -> Iterator[subprocess.Popen[str]]:
    """Another process in the group; see peer.py. It does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sync.peer", str(port), str(rank), str(world_size), str(TIMEOUT_S), *what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", LISTS)
def test_a_list_arrives_in_two_other_processes_bit_for_bit(kind, which):
    host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
    with peer(host.port, 1, 3, kind, which) as first, peer(host.port, 2, 3, kind, which) as second:
        group = host.form(3, "g", "gloo")
        sent = LISTS[which]()
        broadcaster(kind)(group, 0, CPU, TIMEOUT_S).broadcast(sent, BUCKET_BYTES)
        received = [process.communicate(timeout=TIMEOUT_S)[0].strip() for process in (first, second)]
    assert received == [digest(sent)] * 2
    assert digest(sent) == digest(LISTS[which]())


@st.composite
def some_tensors(draw: st.DrawFn) -> list[Tensor]:
    """Random bytes, of any dtype, transposed or with gaps or not."""
    made = []
    for _ in range(draw(st.integers(0, 12))):
        rows, cols = draw(st.integers(0, 40)), draw(st.integers(1, 40))
        dtype = draw(st.sampled_from(DTYPES))
        whole = torch.randint(2, (rows, 2 * cols)).to(dtype)
        made.append(draw(st.sampled_from([whole, whole.T, whole[:, ::2], whole[:, :cols]])))
    return made


@cache
def lasting_ends(num_slots: int) -> list[BucketBroadcast]:
    return [_C.BucketBroadcast(group, 0, CPU, TIMEOUT_S, num_slots) for group in make_pair()]


@settings(deadline=None, max_examples=60)
@given(some_tensors(), st.integers(1, 5000), st.sampled_from([1, 2, 3]))
def test_any_list_in_any_buckets_through_any_number_of_slots_gives_the_same(sent, bucket_bytes, num_slots):
    ends = lasting_ends(num_slots)
    before = digest(sent)
    received = [torch.zeros_like(tensor) for tensor in sent]
    on_both(lambda: ends[0].broadcast(sent, bucket_bytes), lambda: ends[1].broadcast(received, bucket_bytes))
    assert digest(received) == digest(sent) == before


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


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_slots_take_turns_and_their_memory_stays(num_slots):
    group, other = make_pair()
    end = _C.BucketBroadcast(group, 0, CPU, TIMEOUT_S, num_slots=num_slots)
    assert end.slot(100).data_ptr() == end.slot(50).data_ptr(), "nothing was sent in between"
    addresses = []

    def send() -> None:
        for _ in range(3 * num_slots):
            slot = end.slot(100)
            addresses.append(slot.data_ptr())
            end.send(slot)
        end.finish()

    received = torch.zeros(100, dtype=torch.uint8)
    on_both(send, lambda: [other.broadcast(received, 0).wait() for _ in range(3 * num_slots)])
    assert addresses == 3 * addresses[:num_slots]
    assert len(set(addresses)) == num_slots


def test_small_tensors_share_a_broadcast_whatever_lies_between():
    """As a receiver sees it that takes plain broadcasts: the large ones from their storage, then the rest."""
    group, other = make_pair()
    large, small = [torch.full((1000,), i, dtype=torch.uint8) for i in range(3)], torch.arange(30, dtype=torch.uint8)
    end = _C.BucketBroadcast(group, 0, CPU, TIMEOUT_S)
    received = [torch.zeros(size, dtype=torch.uint8) for size in (1000, 1000, 1000, 30)]
    sent = [tensor for pair in zip(small.split(10), large, strict=True) for tensor in pair]
    on_both(lambda: end.broadcast(sent, 1000), lambda: [other.broadcast(flat, 0).wait() for flat in received])
    assert digest(received) == digest([*large, small])


def test_the_root_may_be_any_rank():
    ends = [_C.BucketBroadcast(group, 1, CPU, TIMEOUT_S) for group in make_pair()]
    received = [torch.zeros_like(tensor) for tensor in tensors()]
    on_both(lambda: ends[0].broadcast(received, BUCKET_BYTES), lambda: ends[1].broadcast(tensors(), BUCKET_BYTES))
    assert digest(received) == digest(tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_that_nobody_takes_fails_in_time_and_a_new_group_works(kind):
    group, _absent = make_pair()
    end = broadcaster(kind)(group, 0, CPU, 0.3)
    with pytest.raises(RuntimeError, match=f"bucket 0 of {1 << 20} bytes"):
        send_one(end)
    for again in (lambda: end.slot(1), lambda: send_one(end), end.finish, lambda: end.broadcast([torch.ones(1)], 1)):
        with pytest.raises(RuntimeError, match=f"the broadcast failed: bucket 0 of {1 << 20} bytes"):
            again()
    assert_works(*(broadcaster(kind)(group, 0, CPU, TIMEOUT_S) for group in make_pair()))


def assert_works(root: BucketBroadcast, other: BucketBroadcast) -> None:
    received = torch.zeros(100)
    on_both(lambda: root.broadcast([torch.ones(100)], 64), lambda: other.broadcast([received], 64))
    assert received.all()


def test_abort_ends_a_wait_at_once():
    group, _absent = make_pair(timeout_s=2.0)
    end = _C.BucketBroadcast(group, 0, CPU, 2.0)
    end.send(end.slot(1 << 20))
    waiting = threading.Timer(0.05, end.abort)
    waiting.start()
    with pytest.raises(RuntimeError, match=f"it was aborted in bucket 0 of {1 << 20} bytes"):
        end.finish()
    waiting.join()
    with pytest.raises(RuntimeError, match="it was aborted"):
        end.send(torch.zeros(1, dtype=torch.uint8))


def test_both_ends_can_be_aborted_amid_a_list_and_a_new_group_works():
    ends = [_C.BucketBroadcast(group, 0, CPU, 2.0) for group in make_pair(timeout_s=2.0)]
    sent = [torch.ones(1000) for _ in range(1000)]

    def broadcast_for_ever(end: BucketBroadcast, of: list[Tensor]) -> None:
        while True:
            end.broadcast(of, 4096)

    def broadcast(end: BucketBroadcast, of: list[Tensor]) -> None:
        with pytest.raises(RuntimeError, match="it was aborted"):
            broadcast_for_ever(end, of)

    aborts = [threading.Timer(0.1, end.abort) for end in ends]
    for abort in aborts:
        abort.start()
    on_both(lambda: broadcast(ends[0], sent), lambda: broadcast(ends[1], [torch.zeros(1000) for _ in sent]))
    for abort in aborts:
        abort.join()
    assert_works(*(_C.BucketBroadcast(group, 0, CPU, TIMEOUT_S) for group in make_pair()))


def test_abort_before_the_first_bucket_is_an_error_at_once():
    end = _C.BucketBroadcast(make_pair()[0], 0, CPU, TIMEOUT_S)
    end.abort()
    end.abort()
    with pytest.raises(RuntimeError, match="it was aborted"):
        end.slot(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_stops_or_dies_amid_a_list_is_named_by_its_bucket(kind, way):
    """The peer takes two buckets, then ends; what follows is more than the sockets between us hold."""
    host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
    size = 16 << 20

    def send_for_ever(end: BucketBroadcast) -> None:
        while True:
            end.send(end.slot(size))

    with peer(host.port, 1, 2, "fall", str(size), "2", str(int(way))) as process:
        end = broadcaster(kind)(host.form(2, "g", "gloo"), 0, CPU, 1.0)
        with pytest.raises(RuntimeError) as error:
            send_for_ever(end)
        assert (named := re.search(rf"bucket (\d+) of {size} bytes", str(error.value))), error.value
        assert int(named[1]) == 2
        process.send_signal(signal.SIGKILL)
    assert_works(*(broadcaster(kind)(group, 0, CPU, TIMEOUT_S) for group in make_pair()))


def test_a_peer_that_goes_away_is_an_error():
    group, other = make_pair()
    end = _C.BucketBroadcast(group, 0, CPU, TIMEOUT_S)
    end.send(end.slot(1 << 20))
    del other
    with pytest.raises(RuntimeError, match=f"bucket 0 of {1 << 20} bytes: "):
        end.finish()


def test_only_flat_bytes_are_a_bucket():
    end = _C.BucketBroadcast(make_pair()[0], 0, CPU, TIMEOUT_S)
    for wrong in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]):
        with pytest.raises(RuntimeError, match="a bucket is flat uint8"):
            end.send(wrong)
    for sparse in (torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()):
        with pytest.raises(RuntimeError, match="only tensors that are their bytes"):
            end.broadcast([sparse], BUCKET_BYTES)
    with pytest.raises(RuntimeError, match="root 2 is not among 2 ranks"):
        _C.BucketBroadcast(make_pair()[0], 2, CPU, TIMEOUT_S)
    with pytest.raises(RuntimeError, match="num_slots is 0"):
        _C.BucketBroadcast(make_pair()[0], 0, CPU, TIMEOUT_S, num_slots=0)


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
