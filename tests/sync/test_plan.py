from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from xorl.sync.plan import ITEM_BYTES, Item, TensorSpec, lay_out

shapes = st.lists(st.integers(0, 9) | st.just(16), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(ITEM_BYTES))
limits = st.integers(1, 500)


@st.composite
def models(draw: st.DrawFn) -> list[Item]:
    return [
        Item(
            TensorSpec(f"t{i}", *draw(st.tuples(dtypes, shapes))),
            draw(st.none() | st.builds(TensorSpec, st.just(f"t{i}_scale_inv"), st.just("float32"), shapes)),
        )
        for i in range(draw(st.integers(0, 30)))
    ]


@given(models(), limits)
def test_every_item_with_bytes_goes_once_and_in_order(items, limit):
    sent = [item for bucket in lay_out(items, limit) for item in bucket.items]
    assert sent == [item for item in items if item.num_bytes]


@given(models(), limits)
def test_only_an_item_alone_passes_the_limit(items, limit):
    for bucket in lay_out(items, limit):
        assert bucket.num_bytes <= limit or len(bucket.items) == 1


@given(models(), limits)
def test_a_bucket_announces_codes_together_with_their_scales(items, limit):
    for bucket in lay_out(items, limit):
        names = [tensor.name for tensor in bucket.tensors]
        assert sorted(names) == sorted(tensor.name for item in bucket.items for tensor in item.tensors)


@given(models(), limits)
def test_tensors_lie_back_to_back_at_multiples_of_their_item_size(items, limit):
    for bucket in lay_out(items, limit):
        end = 0
        for tensor, (name, offset) in zip(bucket.tensors, bucket.offsets.items(), strict=True):
            assert (name, offset) == (tensor.name, end)
            assert offset % ITEM_BYTES[tensor.dtype] == 0
            end += tensor.num_bytes
        assert end == bucket.num_bytes


@given(models(), limits, st.sampled_from([16, 256]))
def test_sizes_that_are_round_make_places_that_are(items, limit, step):
    for bucket in lay_out(items, limit):
        for tensor in bucket.tensors:
            assert tensor.num_bytes % step or bucket.offsets[tensor.name] % step == 0


@given(models(), limits)
def test_only_the_first_bucket_has_room_for_what_lies_beside_it(items, limit):
    for bucket, following in pairwise(lay_out(items, limit)):
        assert bucket.items[-1].num_bytes + following.num_bytes > limit
