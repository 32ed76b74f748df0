from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from xorl.sync.plan import ITEM_BYTES, TensorSpec, lay_out

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(ITEM_BYTES))
limits = st.integers(1, 500)


@st.composite
def models(draw: st.DrawFn) -> list[TensorSpec]:
    return [TensorSpec(f"t{i}", *each) for i, each in enumerate(draw(st.lists(st.tuples(dtypes, shapes), max_size=30)))]


@given(models(), limits)
def test_every_tensor_with_bytes_goes_once(specs, limit):
    sent = [spec for bucket in lay_out(specs, limit) for spec in bucket.tensors]
    assert sorted(sent) == sorted(spec for spec in specs if spec.num_bytes)


@given(models(), limits)
def test_only_a_tensor_alone_passes_the_limit(specs, limit):
    for bucket in lay_out(specs, limit):
        assert bucket.num_bytes <= limit or len(bucket.tensors) == 1


@given(models(), limits)
def test_tensors_lie_back_to_back_at_multiples_of_their_item_size(specs, limit):
    for bucket in lay_out(specs, limit):
        ends = [offset + spec.num_bytes for offset, spec in zip(bucket.offsets, bucket.tensors, strict=True)]
        assert bucket.offsets == [0, *ends[:-1]]
        assert ends[-1] == bucket.num_bytes
        assert all(
            offset % ITEM_BYTES[spec.dtype] == 0 for offset, spec in zip(bucket.offsets, bucket.tensors, strict=True)
        )


@given(models(), limits)
def test_buckets_follow_the_order_of_the_model(specs, limit):
    position = {spec.name: i for i, spec in enumerate(specs)}
    runs = [sorted(position[spec.name] for spec in bucket.tensors) for bucket in lay_out(specs, limit)]
    flat = [i for run in runs for i in run]
    assert flat == sorted(flat)
    for bucket in lay_out(specs, limit):
        for dtype in ITEM_BYTES:
            of_dtype = [position[spec.name] for spec in bucket.tensors if spec.dtype == dtype]
            assert of_dtype == sorted(of_dtype)


@given(models(), limits)
def test_no_two_neighbours_would_fit_into_one_bucket(specs, limit):
    buckets = lay_out(specs, limit)
    by_name = {spec.name: spec for spec in specs}
    order = [name for name, spec in by_name.items() if spec.num_bytes]
    for bucket, following in pairwise(buckets):
        first = min(following.tensors, key=lambda spec: order.index(spec.name))
        assert bucket.num_bytes + first.num_bytes > limit
