"""The samplers: what a stream owes to the paper, to its ranks, and to whoever stops and resumes it."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from relaylab.data.keyed import keys, permute, uniforms
from relaylab.data.sampling import ClassAwareSampler, DrawBatches, KeyedSampler, ShuffledSampler, SquareRootSampler
from relaylab.errors import InputError

KINDS = (ClassAwareSampler, ShuffledSampler, SquareRootSampler)

some = settings(deadline=None, max_examples=30)

# Sizes of classes, one image included, in an order that is not that of the labels' first appearance.
sizes = st.lists(st.integers(1, 12), min_size=1, max_size=9)
seeds = st.integers(0, 2**63)


def labels_of(counts: list[int], order: int = 0) -> np.ndarray:
    return np.random.default_rng(order).permutation(np.repeat(np.arange(len(counts), dtype=np.int16), counts))


def draws(sampler: KeyedSampler, count: int, begin: int = 0) -> np.ndarray:
    return sampler.draw(np.arange(begin, begin + count))


@some
@given(sizes, seeds, st.integers(0, 50))
def test_each_class_comes_once_in_each_cycle(counts: list[int], seed: int, cycle: int) -> None:
    labels = labels_of(counts)
    drawn = labels[draws(ClassAwareSampler(labels, seed=seed), len(counts), cycle * len(counts))]
    assert sorted(drawn) == list(range(len(counts)))


@some
@given(sizes, seeds)
def test_each_image_comes_once_in_each_reshuffle_of_its_class(counts: list[int], seed: int) -> None:
    labels = labels_of(counts)
    drawn = draws(ClassAwareSampler(labels, seed=seed), 3 * max(counts) * len(counts))
    for label, count in enumerate(counts):
        of_class = drawn[labels[drawn] == label].tolist()
        for begin in range(0, len(of_class) - count + 1, count):
            assert sorted(of_class[begin : begin + count]) == np.flatnonzero(labels == label).tolist()


@some
@given(sizes, seeds, st.integers(0, 5))
def test_shuffling_gives_every_image_once_in_each_pass(counts: list[int], seed: int, cycle: int) -> None:
    labels = labels_of(counts)
    assert sorted(draws(ShuffledSampler(labels, seed=seed), len(labels), cycle * len(labels))) == list(
        range(len(labels))
    )


def test_square_root_sampling_gives_each_class_its_root() -> None:
    counts = [1, 4, 9, 100]
    labels = labels_of(counts)
    sampler = SquareRootSampler(labels, seed=5)
    cycle = 10 * (1 + 2 + 3 + 10)
    drawn = draws(sampler, 3 * cycle)
    for begin in range(0, 3 * cycle, cycle):
        assert np.bincount(labels[drawn[begin : begin + cycle]]).tolist() == [10, 20, 30, 100]
    largest = drawn[labels[drawn] == 3].tolist()  # a cycle holds just one pass over its hundred images
    assert [len(set(largest[begin : begin + 100])) for begin in (0, 100, 200)] == [100, 100, 100]


@pytest.mark.parametrize("kind", KINDS)
@some
@given(sizes, seeds, st.integers(1, 7), st.integers(1, 5))
def test_ranks_share_the_stream_of_one_process(
    kind: type[KeyedSampler], counts: list[int], seed: int, ranks: int, each: int
) -> None:
    labels = labels_of(counts)
    whole = list(kind(labels, seed=seed, num_samples=ranks * each))
    parts = [list(kind(labels, seed=seed, rank=r, num_replicas=ranks, num_samples=each)) for r in range(ranks)]
    assert [image for step in zip(*parts, strict=True) for image in step] == whole


@pytest.mark.parametrize("kind", KINDS)
@some
@given(sizes, seeds, st.integers(0, 200), st.integers(1, 40))
def test_resumed_at_any_draw_the_stream_is_the_same(
    kind: type[KeyedSampler], counts: list[int], seed: int, done: int, epoch: int
) -> None:
    labels = labels_of(counts)
    sampler = kind(labels, seed=seed, num_samples=epoch)
    uninterrupted = [next(stream) for stream in [endless(sampler)] for _ in range(done + 30)]
    stopped = kind(labels, seed=seed, num_samples=epoch)
    stream = endless(stopped)
    for _ in range(done):
        next(stream)
    resumed = kind(labels, seed=seed, num_samples=epoch)
    resumed.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
    assert resumed.position == done
    assert [next(again) for again in [endless(resumed)] for _ in range(30)] == uninterrupted[done:]


def endless(sampler: KeyedSampler) -> itertools.chain[int]:
    return itertools.chain.from_iterable(iter(sampler) for _ in itertools.count())


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_cycles_differ(kind: type[KeyedSampler]) -> None:
    labels = labels_of([30] * 10)
    one, other = kind(labels, seed=1), kind(labels, seed=2)
    assert not np.array_equal(draws(one, 300), draws(other, 300))
    assert not np.array_equal(labels[draws(one, 300)], labels[draws(other, 300)])
    assert not np.array_equal(draws(one, 300), draws(one, 300, 300))
    assert np.array_equal(draws(one, 300), draws(kind(labels, seed=1), 300))
    cycles = labels[draws(ClassAwareSampler(labels), 300)].reshape(30, 10)
    assert len({tuple(cycle) for cycle in cycles.tolist()}) == 30


def test_distant_draws_cost_no_more_and_do_not_overflow() -> None:
    labels = np.repeat(np.arange(401, dtype=np.int16), 50)
    far = 2**40
    drawn = ClassAwareSampler(labels).draw(np.arange(far * 401, far * 401 + 401))
    assert sorted(labels[drawn]) == list(range(401))


def test_labels_of_eight_million_images_may_be_strings_of_equal_classes_or_mixed() -> None:
    """The counting sort goes in pieces; across their borders the order within a class is kept."""
    labels = np.tile(np.arange(3, dtype=np.int32), 500_000)
    sampler = ClassAwareSampler(labels)
    order = sampler._order.reshape(3, 500_000)
    for label in range(3):
        assert np.array_equal(order[label], np.arange(label, 1_500_000, 3))


def test_distinct_classes_of_a_global_batch() -> None:
    """401 classes, batch 256 of 8 ranks: 238.6 expected of interleaved ranks; contiguous slices give 194.8."""
    labels = np.repeat(np.arange(401, dtype=np.int16), 20)
    each = 256 // 8
    parts = [
        np.array(list(ClassAwareSampler(labels, rank=rank, num_replicas=8, num_samples=401 * each)))
        for rank in range(8)
    ]
    batches = np.concatenate([labels[part].reshape(401, each) for part in parts], axis=1)
    mean = np.mean([len(set(batch)) for batch in batches.tolist()])
    assert 237.5 < mean < 239.7


def test_loaders_take_it_as_any_sampler() -> None:
    labels = labels_of([3, 5, 2])
    loader = DataLoader(labels.astype(np.int64), batch_size=4, sampler=ClassAwareSampler(labels, num_samples=12))
    first, second = ([batch.tolist() for batch in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert Counter(itertools.chain(*first)) == Counter({0: 4, 1: 4, 2: 4})
    assert first != second, "the second epoch goes on where the first ended"


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_stateful_dataloader_resumes_in_the_middle_of_an_epoch(workers: int, batched: bool) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    labels = labels_of([3, 5, 2, 7])

    def make() -> StatefulDataLoader:
        sampler = ClassAwareSampler(labels, seed=3, num_samples=24)
        if batched:
            return StatefulDataLoader(Pairs(), batch_sampler=DrawBatches(sampler, 4), num_workers=workers)
        return StatefulDataLoader(np.arange(len(labels)), batch_size=4, sampler=sampler, num_workers=workers)

    def read(loader: StatefulDataLoader, epochs: int) -> list[list[int]]:
        return [np.asarray(batch).tolist() for _ in range(epochs) for batch in loader]

    uninterrupted = read(make(), 2)
    loader = make()
    stream = iter(loader)
    begun = [np.asarray(next(stream)).tolist() for _ in range(3)]
    state = loader.state_dict()
    del stream
    resumed = make()
    resumed.load_state_dict(state)
    assert begun + read(resumed, 2) == uninterrupted


class Pairs:
    """Gives back what the batch sampler asked for."""

    def __getitems__(self, draws: np.ndarray) -> list[list[int]]:
        return draws.tolist()

    def __getitem__(self, index: int) -> None:
        raise AssertionError("asked for one item")

    def __len__(self) -> int:
        return 17


@some
@given(sizes, st.integers(1, 9), st.integers(1, 3))
def test_draw_batches_are_the_stream_with_its_numbers(counts: list[int], batch_size: int, ranks: int) -> None:
    labels = labels_of(counts)
    whole = draws(ClassAwareSampler(labels, seed=4), 10_000)
    batches = DrawBatches(ClassAwareSampler(labels, seed=4, rank=ranks - 1, num_replicas=ranks), batch_size)
    epochs = [list(batches) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(batches)] * 3
    pairs = np.concatenate([batch for epoch in epochs for batch in epoch])
    assert np.array_equal(pairs[:, 0], np.arange(len(pairs)) * ranks + ranks - 1), "no draw is dropped between epochs"
    assert np.array_equal(pairs[:, 1], whole[pairs[:, 0]])


def test_a_batch_sampler_of_pytorch_agrees() -> None:
    labels = labels_of([3, 5, 2])
    theirs = list(BatchSampler(ClassAwareSampler(labels, num_samples=12), 4, drop_last=True))
    ours = [batch[:, 1].tolist() for batch in DrawBatches(ClassAwareSampler(labels, num_samples=12), 4)]
    assert ours == theirs


def test_a_state_moves_to_another_number_of_ranks() -> None:
    labels = labels_of([3, 5, 2])
    two = ClassAwareSampler(labels, rank=1, num_replicas=2)
    two.seek(6)
    three = ClassAwareSampler(labels, rank=0, num_replicas=3)
    three.load_state_dict(two.state_dict())
    assert three.position == 4
    two.seek(5)
    with pytest.raises(InputError, match="draw 10 is not a multiple of the number of ranks, 3"):
        three.load_state_dict(two.state_dict())


@pytest.mark.parametrize("change", [{"seed": 1}, {"labels": [3, 5, 1, 1]}, {"kind": ShuffledSampler}])
def test_a_state_of_another_stream_is_refused(change: dict) -> None:
    state = ClassAwareSampler(labels_of([3, 5, 2]), seed=0).state_dict()
    kind = change.get("kind", ClassAwareSampler)
    other = kind(labels_of(change.get("labels", [3, 5, 2])), seed=change.get("seed", 0))
    with pytest.raises(InputError, match="the sampler's state has"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", [ClassAwareSampler, SquareRootSampler])
def test_classes_without_images_are_refused_by_name(kind: type[KeyedSampler]) -> None:
    labels = np.array([0, 2, 2])
    with pytest.raises(InputError, match="classes without images: bakery, dam; remove these classes"):
        kind(labels, classes=["abbey", "bakery", "cafe", "dam"])
    with pytest.raises(InputError, match="class 1"):
        kind(labels)
    assert len(ShuffledSampler(labels, classes=["abbey", "bakery", "cafe", "dam"])) == 3


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "expected integers|no images"),
        (np.empty(0, np.int16), {}, "no images"),
        ([0.5, 1], {}, "expected integers"),
        ([[0, 1]], {}, "of shape"),
        ([0, -1], {}, "labels contain -1: expected class indices from 0"),
        ([0, 7], {"classes": ["a", "b"]}, "labels contain 7, but there are only 2 classes"),
        ([0, 1], {"rank": 2, "num_replicas": 2}, "rank 2 of 2"),
        ([0, 1], {"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_arguments(labels: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassAwareSampler(labels, **options)
    with pytest.raises(InputError, match="batch_size"):
        DrawBatches(ClassAwareSampler([0, 1]), 0)
    with pytest.raises(InputError, match="position"):
        ClassAwareSampler([0, 1]).seek(-1)


# Keyed permutations and numbers.


@some
@given(st.integers(1, 500), seeds)
def test_permute_permutes(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, keys(seed))) == list(range(size))
    mixed_sizes = np.arange(1, size + 1)  # one call, a domain and a key for each position
    image = permute(mixed_sizes - 1, mixed_sizes, keys(seed, mixed_sizes))
    alone = [permute(np.array([n - 1]), n, keys(seed, n)).item() for n in mixed_sizes.tolist()]
    assert image.tolist() == alone


def chi_squared(observed: np.ndarray) -> float:
    """In standard deviations above what chance gives."""
    expected = observed.sum() / len(observed)
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_all_permutations_of_few_positions_are_equally_likely(size: int) -> None:
    key = keys(11, np.arange(40_000))
    images = np.stack([permute(np.full(len(key), place), size, key) for place in range(size)], axis=1)
    _, counts = np.unique(images @ size ** np.arange(size), return_counts=True)
    assert len(counts) == np.prod(np.arange(1, size + 1))
    assert size == 1 or chi_squared(counts) < 5


@pytest.mark.parametrize("size", [10, 33, 401, 1000])
def test_every_place_and_every_distance_of_neighbours_is_equally_likely(size: int) -> None:
    key = keys(12, np.arange(20_000))
    first, second = (permute(np.full(len(key), place), size, key) for place in (0, 1))
    assert chi_squared(np.bincount(first, minlength=size)) < 5
    assert chi_squared(np.bincount((second - first) % size, minlength=size)[1:]) < 5


def test_the_chi_squared_test_would_notice() -> None:
    assert chi_squared(np.bincount(np.arange(20_000) % 401 // 2 * 2, minlength=401)) > 100


def test_a_long_permutation_looks_shuffled() -> None:
    image = permute(np.arange(30_000), 30_000, keys(13))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    steps = len(set(np.diff(image).tolist())) / 30_000
    assert 0.72 < steps < 0.75, "numpy's own shuffle has 0.735 distinct steps for each image"


def test_uniforms_are_uniform_and_a_function_of_seed_and_number() -> None:
    numbers = np.arange(20_000)
    drawn = uniforms(3, numbers, 4)
    assert drawn.shape == (20_000, 4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    assert np.array_equal(uniforms(3, numbers[[7, 3]], 2), drawn[[7, 3], :2])
    assert not np.array_equal(uniforms(4, numbers, 4), drawn)
