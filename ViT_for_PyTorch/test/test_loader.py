"""Order, sharding, exact resume, exact evaluation and broken pictures, for any number of workers."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UsageError
from vit.data.augment import Augmentation, EvalTransform, TrainTransform
from vit.data.image_folder import BrokenImage, scan
from vit.data.loader import EvalLoader, TrainLoader, to_model_input

COUNT, SIZE = 23, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 pictures in 2 classes; the red channel's mean tells which picture it is."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(COUNT):
        path = root / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        pixels[..., 0] = index * 10
        Image.fromarray(pixels).save(path)
    return scan(root)


def train_loader(folder, **options):
    options = {"batch_size": 4, "seed": 5, **options}
    return TrainLoader(folder, TrainTransform(SIZE), **options)


def plain_loader(folder, **options):
    """No augmentation that would hide which picture it is."""
    transform = TrainTransform(SIZE, Augmentation(auto_augment="", random_erasing=0.0))
    return TrainLoader(folder, transform, **{"batch_size": 4, "seed": 5, **options})


def pictures(batches):
    """Which pictures: the red level over ten."""
    return [round(float(image[0].float().mean()) / 10) for batch in batches for image in batch.images]


def same(one, two):
    return (
        torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets) and one.erasures == two.erasures
    )


def test_batches_are_uint8_pictures_with_targets(folder):
    batches = list(train_loader(folder).epoch(0))
    assert len(batches) == train_loader(folder).steps_per_epoch == 5
    for batch in batches:
        assert batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64 and not batch.bad_files
    images, targets = to_model_input(batches[0], torch.device("cpu"))
    assert images.shape == (4, 3, SIZE, SIZE) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(targets, batches[0].targets)


def test_workers_change_nothing_and_any_step_can_be_the_first(folder):
    whole = {epoch: list(train_loader(folder).epoch(epoch)) for epoch in (0, 1)}
    assert any(batch.erasures for batch in whole[0] + whole[1])
    for workers in (1, 2):
        loader = train_loader(folder, num_workers=workers)
        next(iter(loader.epoch(0)))  # an epoch that is left early must not disturb the next
        for epoch, start in ((0, 2), (1, 0), (0, 5)):
            batches = list(loader.epoch(epoch, start))
            assert len(batches) == 5 - start
            assert all(same(one, two) for one, two in zip(batches, whole[epoch][start:], strict=True))


def test_epochs_and_seeds_have_their_own_order(folder):
    orders = [
        pictures(plain_loader(folder, seed=seed, batch_size=1).epoch(epoch))
        for seed, epoch in ((5, 0), (5, 1), (6, 0), (6, 1))
    ]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_ranks_split_each_global_batch_of_one_rank(folder):
    single = list(train_loader(folder, batch_size=6).epoch(1))
    ranks = [list(train_loader(folder, batch_size=3, rank=rank, world_size=2).epoch(1)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [len(single)] * 2
    for step, batch in enumerate(single):
        parts = [batches[step] for batches in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        images = torch.cat([to_model_input(part, torch.device("cpu"))[0] for part in parts])
        assert torch.equal(images, to_model_input(batch, torch.device("cpu"))[0])  # the erasing noise too


def test_fewer_pictures_than_a_global_batch_is_an_error(folder):
    with pytest.raises(UsageError, match="23 pictures, fewer than one global batch of 24"):
        train_loader(folder, batch_size=12, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 8, 30])
def test_evaluation_sees_every_picture_once(folder, world_size):
    seen, targets = [], []
    for rank in range(world_size):
        loader = EvalLoader(folder, EvalTransform(SIZE), batch_size=4, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += pictures(batches)
        targets += [target for batch in batches for target in batch.targets.tolist()]
    assert sorted(seen) == list(range(COUNT))
    assert targets == [number % 2 for number in seen]  # class0 has the even pictures


def test_evaluation_can_be_repeated_with_workers(folder):
    loader = EvalLoader(folder, EvalTransform(SIZE), batch_size=5, num_workers=2)
    first, second = list(loader), list(loader)
    assert pictures(first) == pictures(second) and all(map(same, first, second))


@pytest.fixture
def flawed(tmp_path):
    """300 names of whole pictures and 2 broken ones."""
    good = tmp_path / "a" / "good.png"
    good.parent.mkdir()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(good)
    for index in range(300):
        (good.parent / f"{index:03d}.png").symlink_to(good)
    (tmp_path / "a" / "bad0.png").write_bytes(good.read_bytes()[:40])
    (tmp_path / "a" / "bad1.jpg").write_bytes(b"\xff\xd8 no picture")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_training_pictures_are_replaced_named_and_counted(flawed, workers):
    loader = plain_loader(scan(flawed), batch_size=2, num_workers=workers)
    with pytest.warns(UserWarning) as warned:
        batches = list(loader.epoch(0)) + list(loader.epoch(1))
    messages = sorted(str(warning.message) for warning in warned if "skipped" in str(warning.message))
    assert len(messages) == 2 and "bad0.png" in messages[0] and "bad1.jpg" in messages[1]
    assert len(loader.bad_files) == 2 and sum(len(batch.bad_files) for batch in batches) == 4
    assert all((batch.images[:, 0] == 200).all() for batch in batches)


def test_too_many_broken_training_pictures_stop_the_run(flawed):
    for index in range(3):
        (flawed / "a" / f"worse{index}.png").write_bytes(b"")
    loader = plain_loader(scan(flawed), batch_size=1, num_workers=1)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="4 of the 306 pictures .* more than 1%"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_evaluation_picture_is_an_error_that_names_it(flawed, workers):
    loader = EvalLoader(scan(flawed), EvalTransform(SIZE), batch_size=8, num_workers=workers)
    with pytest.raises(BrokenImage, match=r"bad0.png: not a readable picture \(.*\)$"):
        list(loader)
