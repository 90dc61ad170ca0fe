"""Windows and lanes: shards in sequence, each record once, the same everywhere."""

import collections
import json
import tracemalloc

import numpy as np
import pytest
from iterator_test import assert_equal, make_iterator, make_sources, record_of

from unicl_jax.data.sampler import Sampler, SourceInfo
from unicl_jax.data.windows import WindowedOrder, of_lane
from unicl_jax.errors import InputError

LABEL, TEXT = "image_label", "image_text"


def rows_of_epoch(order, epoch):
    """All rows of an epoch: lanes [N], numbers [N], by lane and number."""
    lanes, numbers = [], []
    for lane in range(order.lanes):
        start, stop = (
            of_lane(e * order.length, lane, order.lanes) for e in (epoch, epoch + 1)
        )
        numbers.append(np.arange(start, stop))
        lanes.append(np.full(stop - start, lane))
    return np.concatenate(lanes), np.concatenate(numbers)


def random_orders(count):
    """Odd ones: empty shards, more lanes than shards or records, any windows."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        sizes = rng.integers(0, rng.integers(2, 40), rng.integers(1, 30))
        sizes[0] += not sizes.any()
        lanes, window = rng.integers(1, 12), rng.integers(1, 70)
        yield WindowedOrder("made", sizes, int(lanes), int(window), 3), sizes


# --- The order of one source.


def test_each_record_comes_once_an_epoch_and_lanes_have_equal_parts():
    for order, _ in random_orders(150):
        for epoch in (0, 1, 7):
            lanes, numbers = rows_of_epoch(order, epoch)
            index = order.indices(lanes, numbers)
            assert sorted(index.tolist()) == list(range(order.length))
            assert np.ptp(np.bincount(lanes, minlength=order.lanes)) <= 1
            # Row by row, in any company, it is the same.
            some = np.random.default_rng(epoch).permutation(order.length)[:5]
            assert [
                int(order.indices(lanes[i : i + 1], numbers[i : i + 1])[0])
                for i in some
            ] == index[some].tolist()


def test_a_lane_walks_its_part_window_by_window():
    """Sorted within windows, the lanes behind each other are the shards in sequence."""
    for order, sizes in random_orders(60):
        lanes, numbers = rows_of_epoch(order, 2)
        index = order.indices(lanes, numbers)
        shard = np.repeat(np.arange(len(sizes)), sizes)
        sequence = []  # of the epoch: shards in its order, each in the file's
        for s in order.shards_between(2, 0, order.length):
            sequence += np.flatnonzero(shard == s).tolist()
        place = np.argsort(sequence)[index]
        for lane in range(order.lanes):
            mine = place[lanes == lane]
            chunk = order.chunk(2, lane)
            assert chunk.size == len(mine)
            assert sorted(mine) == list(range(chunk.start, chunk.start + chunk.size))
            early = 0
            while early < len(mine):  # the longest run that starts here and is closed
                size = next(
                    k
                    for k in range(1, len(mine) - early + 1)
                    if mine[early : early + k].max() < chunk.start + early + k
                )
                assert size <= order.window
                early += size
            assert np.abs(mine - chunk.start - np.arange(len(mine))).max(initial=0) < (
                order.window
            )


def test_a_window_is_mixed_and_epochs_seeds_and_names_differ():
    def walk(epoch=0, name="made", seed=0, lane=0):
        order = WindowedOrder(name, [100] * 8, 2, 40, seed)
        lanes, numbers = rows_of_epoch(order, epoch)
        return order.indices(lanes, numbers)[lanes == lane]

    walks = [walk(), walk(1), walk(2), walk(name="other"), walk(seed=1)]
    shards = {tuple(dict.fromkeys((w // 100).tolist())) for w in walks}
    assert len(shards) == 5  # the shards' order
    within = {tuple((w[:40] % 100).tolist()) for w in walks}
    assert len(within) == 5
    second = walk()[40:80], walk(lane=1)[16:56]  # windows, also of lanes
    assert np.ptp(second[0]) == np.ptp(second[1]) == 39
    assert (second[0] - second[0].min() != second[1] - second[1].min()).any()
    rises = np.mean(np.diff(walk()) > 0)
    assert 0.4 < rises < 0.6  # in sequence it would be 1


def test_lanes_begin_windows_at_times_of_their_own():
    order = WindowedOrder("made", [4096] * 8, 8, 64, 0)
    lanes, numbers = rows_of_epoch(order, 0)
    index = order.indices(lanes, numbers)
    begins = []
    for lane in range(8):
        place = np.abs(index[lanes == lane] - index[lanes == lane].min())[:128]
        ends = np.flatnonzero(np.maximum.accumulate(place) == np.arange(128))
        begins.append(int(ends[ends < 64].max()) + 1)
    assert len(set(begins)) == 8


def test_a_billion_records_take_memory_of_their_shards():
    sizes = np.full(5000, 200_000)
    order = WindowedOrder("made", sizes, 64, 4096, 0)
    lane = np.arange(4096) % 64
    tracemalloc.start()
    index = order.indices(lane, 7_000_000 + np.arange(4096) // 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(index.tolist())) == 4096 and index.max() < 10**9
    assert peak < 4 << 20


def test_shards_of_a_stretch_are_those_it_lies_in():
    order = WindowedOrder("made", [5, 0, 3, 4], 1, 2, 0)
    all_of_it = order.shards_between(0, 0, 12).tolist()
    assert sorted(all_of_it) == [0, 2, 3]
    sizes = [(5, 0, 3, 4)[s] for s in all_of_it]
    assert order.shards_between(0, 0, sizes[0]).tolist() == all_of_it[:1]
    assert order.shards_between(0, 0, sizes[0] + 1).tolist() == all_of_it[:2]
    assert order.shards_between(0, sizes[0], sizes[0] + 1).tolist() == all_of_it[1:2]
    assert not len(order.shards_between(0, 4, 4))


# --- Mixtures.


def test_lanes_share_every_source_exactly_and_sum_to_the_batch():
    rng, refused = np.random.default_rng(1), 0
    for _ in range(80):
        lanes, num = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        batch = lanes * int(rng.integers(num, 12))
        infos = []
        for k in range(num):
            weight = round(rng.random() + num / batch, 3)
            kind = (LABEL, TEXT)[rng.integers(2)]
            infos.append(SourceInfo(f"s{k}", kind, 90, weight, (40, 50) * (k != 1)))
        try:
            many = Sampler(infos, batch, "weights", 0, lanes, 16)
        except InputError:
            refused += 1
            continue
        assert set(many.windowed) == set(range(num)) - {1}
        reached = np.zeros((num, lanes), int)
        for step in range(30):
            source = many.plan(step).source.reshape(lanes, -1)
            reached += [(source == k).sum(1) for k in range(num)]
            np.testing.assert_array_equal(reached, many.drawn_by_lane(step + 1))
            assert reached.sum(1).tolist() == many.drawn(step + 1)
            exact = np.array([share * batch * (step + 1) for share in many.shares])
            assert np.abs(reached.sum(1) - exact.astype(float)).max() < 1
            assert np.abs(reached - exact.astype(float)[:, None] / lanes).max() < 1
            assert np.ptp(reached, axis=1).max() <= 1
    assert refused < 40


def test_small_sources_need_no_row_of_every_lane_but_among_many():
    def make(*weights, lanes=16):
        infos = [SourceInfo(f"s{k}", LABEL, 99, w) for k, w in enumerate(weights)]
        return Sampler(infos, 256, "weights", 0, lanes, 8)

    for weights in [(1, 90), (50, 1, 1, 50), (1, 30, 30, 1, 30)]:
        many = make(*weights)
        drawn = np.array([many.drawn_by_lane(step) for step in range(40)])
        assert (np.diff(drawn, axis=0) >= 0).all()
    with pytest.raises(InputError, match='in each of data.lanes: "s[0-2]".*of 16 rows'):
        make(1.1, 1, 1.2, 90)
    make(1.1, 1, 1.2, 90, lanes=2)


def test_balanced_stays_half_and_half_in_every_batch_and_lane():
    infos = [
        SourceInfo("a", LABEL, 101, 2.0, (50, 51)),
        SourceInfo("b", TEXT, 53, 1.0, (53,)),
        SourceInfo("c", LABEL, 37, 0.7),
        SourceInfo("d", TEXT, 211, 0.5, (100, 111)),
    ]
    many = Sampler(infos, 80, "balanced", 0, lanes=4, window=8)
    for step in range(100):
        labelled = (many.plan(step).source % 2 == 0).reshape(4, 20)
        assert (labelled.sum(1) == 10).all()
        assert (labelled[0] != labelled[1]).any()  # shuffled each in its own way


@pytest.mark.parametrize("window", [0, 7])
def test_with_lanes_each_record_still_comes_once_an_epoch(window):
    infos = [
        SourceInfo("a", LABEL, 101, 1.0, (31, 0, 70)),
        SourceInfo("b", TEXT, 53, 1.0, (53,)),
    ]
    lanes = 5
    many = Sampler(infos, 60, "proportional", 0, lanes, window)
    seen = [collections.Counter(), collections.Counter()]
    for step in range(40):
        plan = many.plan(step)
        for s in (0, 1):
            seen[s].update(plan.index[plan.source == s].tolist())
            counts = [seen[s][i] for i in range(infos[s].length)]
            drawn = many.drawn(step + 1)[s]
            # A lane may be a row ahead of its share, or behind it.
            early = sum(max(c - -(-drawn // infos[s].length), 0) for c in counts)
            late = sum(max(drawn // infos[s].length - c, 0) for c in counts)
            assert early + late <= lanes


def test_a_batch_that_lanes_do_not_fit_is_told():
    infos = [SourceInfo("a", LABEL, 90), SourceInfo("b", TEXT, 10)]
    with pytest.raises(InputError, match="divisible by data.lanes: got 32 and 5"):
        Sampler(infos, 32, "proportional", 0, lanes=5)


# --- Batches.


SHARDS = {"animals": (7, 11, 12), "things": (50,), "alt": (100, 1, 0, 99, 100)}


@pytest.fixture
def opened():
    """Makes iterators over sources with shards, and closes them."""
    iterators = []

    def make(**options):
        sources = make_sources()
        for source in sources:
            source.shard_sizes = SHARDS.get(source.name, ())
        options = dict(lanes=4, window=9) | options
        iterators.append(make_iterator(sources, **options))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def joined(batches):
    """One global batch of the processes' parts."""
    keys = batches[0].keys()
    return {key: np.concatenate([b[key] for b in batches]) for key in keys}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_slices_of_the_same_batches(processes, opened):
    whole = opened()
    parts = [opened(process_index=i, process_count=processes) for i in range(processes)]
    for _ in range(12):
        assert_equal(joined([next(part) for part in parts]), next(whole))


def test_three_processes_and_any_lanes_give_these_batches_too(opened):
    options = dict(batch_size=36, lanes=4)
    whole = opened(**options)
    parts = [opened(process_index=i, process_count=3, **options) for i in range(3)]
    for _ in range(5):
        assert_equal(joined([next(part) for part in parts]), next(whole))


def test_a_run_goes_on_from_any_step_on_another_number_of_processes(opened):
    whole = opened()
    expected = [next(whole) for _ in range(40)]
    pair = [opened(process_index=i, process_count=2) for i in range(2)]
    for step in range(6):
        assert_equal(joined([next(part) for part in pair]), expected[step])
    saved = [json.dumps(part.state()) for part in pair]
    assert saved == ['{"step": 6}'] * 2
    alone = opened()
    alone.restore(json.loads(saved[0]))
    for step in range(6, 10):
        assert_equal(next(alone), expected[step])
    for step in np.random.default_rng(0).integers(0, 38, 5).tolist():
        four = [opened(process_index=i, process_count=4) for i in range(4)]
        for part in four:
            part.restore({"step": step})
        for k in (0, 1):
            assert_equal(joined([next(part) for part in four]), expected[step + k])


def test_a_lane_fills_its_slice_from_its_part_of_the_shards(opened):
    iterator = opened(lanes=8, window=9)
    order = iterator.sampler.windowed[3]
    lanes, numbers = rows_of_epoch(order, 0)
    owner = dict(
        zip(order.indices(lanes, numbers).tolist(), lanes.tolist(), strict=True)
    )
    for _ in range(4):
        for row, image in enumerate(next(iterator)["image"]):
            source, record = record_of(image)
            if source == 3:
                assert owner[record] == row // 4


def test_shards_of_a_process_and_what_sharing_a_lane_costs_are_said(opened):
    assert opened(window=0, process_count=2).said == opened().said == []
    said = opened(lanes=4, process_index=1, process_count=4).said
    assert said[1].startswith("things: 1 shards in 4 lanes; this process's 1 read 1 of")
    assert said[1].endswith("read by up to 4 processes, each a part of it")
    assert len(said) == 3 and said[2].endswith("of them in the first epoch")
    said = opened(lanes=1, process_count=4).said
    assert "together 4.0 times the data" in said[-1]
    said = opened(lanes=4, batch_size=36, process_count=3).said
    assert "together 1.5 times the data" in said[-1]
