"""Which samples every rank of every project sees: all once and none twice, equal steps, another order each epoch.

What does not fill a step is treated by one rule a project, which is checked too:
  ViT, BEiT v2   the rest of the epoch that does not fill a global batch is left out, other samples each epoch
  CLIP           with --dataloader_drop_last likewise; without it fewer samples than ranks are left out
  data2vec       nothing is left out by the ranks: one without a batch in the last step gets one with no rows. (As in
                 fairseq, a plan's last batch is dropped when its rows are no multiple of required_batch_size_multiple.)
  evaluation     nothing is left out and nothing counted twice (CLIP, ViT, BEiT v2: rank r of R has r, r + R, ...)
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import vit  # noqa: F401  mends torchvision before timm and transformers
from beit2.image_data import run_batches, steps_per_epoch
from ci.training_cases import TEXT_CONFIG
from clip_pretraining.data.batches import EpochLoader, GlobalBatchSampler
from clip_pretraining.data.shards import read_shards
from common.distributed import World
from data2vec.config import load_config
from data2vec.data.dictionary import Dictionary
from data2vec.data.indexed_dataset import write_corpus
from data2vec.data.pretraining_data import PretrainingData
from vit.data.augment import Augmentation, EvalTransform, TrainTransform
from vit.data.image_folder import ImageFolder
from vit.data.loader import EvalLoader, TrainLoader
from vit.training.data import training_batches

SAMPLES, BATCH, SEED = 53, 3, 5
# (epoch, first step of it, rank, ranks) -> the sample ids of every step from there to the epoch's end
Steps = list[list[int]]
Loader = Callable[[int, int, int, int], Steps]


class Ids(torch.utils.data.Dataset):
    """Items are the ids that were asked for."""

    def __init__(self, ids: list):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key):
        return self.ids[key[1] if isinstance(key, tuple) else key]

    def set_epoch(self, epoch: int) -> None:
        """As CLIP's pairs have, for crops at random."""


@pytest.fixture(scope="module")
def vit_loader(tmp_path_factory) -> Loader:
    """The real loader; the class of a picture is its id."""
    path = tmp_path_factory.mktemp("vit") / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    folder = ImageFolder(path.parent, [str(n) for n in range(SAMPLES)], [str(path)] * SAMPLES, list(range(SAMPLES)))

    def steps(epoch: int, first: int, rank: int, ranks: int) -> Steps:
        transform = TrainTransform(8, Augmentation(min_crop_scale=0.5, auto_augment="", random_erasing=0.0))
        loader = TrainLoader(folder, transform, batch_size=BATCH, seed=SEED, rank=rank, world_size=ranks)
        batches = training_batches(loader, 1, epoch * loader.steps_per_epoch + first)
        return [next(batches).targets.tolist() for _ in range(loader.steps_per_epoch - first)]

    steps.folder = folder
    return steps


def beit2_steps(epoch: int, first: int, rank: int, ranks: int) -> Steps:
    options = argparse.Namespace(update_freq=1, batch_size=BATCH, seed=SEED, num_workers=0, pin_mem=False)
    count = steps_per_epoch(SAMPLES, BATCH, ranks)
    world = World(rank=rank, size=ranks)
    return list(
        run_batches(Ids(list(range(SAMPLES))), options, world, count, epoch * count + first, (epoch + 1) * count, list)
    )


@pytest.fixture(scope="module")
def clip_keys(tmp_path_factory) -> list[str]:
    """Samples of three WebDataset tars of different sizes, as `read_shards` finds them."""
    import io
    import tarfile

    folder = tmp_path_factory.mktemp("shards")
    edges = [0, 11, 40, SAMPLES]
    for shard in range(3):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(edges[shard], edges[shard + 1]):
                for suffix, data in (("jpg", b"never decoded here"), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return read_shards(str(folder / "part-{0..2}.tar")).image_keys


def clip_steps(keys: list[str], drop_last: bool, epoch: int, first: int, rank: int, ranks: int) -> Steps:
    sampler = GlobalBatchSampler(len(keys), BATCH, SEED, rank, ranks, drop_last)
    loader = EpochLoader(Ids([int(key) for key in keys]), batch_sampler=sampler, collate_fn=list)
    loader.set_epoch(epoch)
    return list(loader)[first:]


@pytest.fixture(scope="module")
def data2vec_loader(tmp_path_factory) -> Loader:
    """The real loader over a mapped corpus of one sentence a sample."""
    folder = tmp_path_factory.mktemp("corpus")
    words = Dictionary()
    for word in "abcdefgh":
        words.add_symbol(word)
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in "abcdefgh"))
    generator = np.random.default_rng(0)
    sentences = [generator.integers(4, 12, 3 + n % 9).astype(np.int64) for n in range(SAMPLES)]
    write_corpus(folder / "train", (np.append(s, words.eos_index) for s in sentences), np.uint16)
    text = TEXT_CONFIG.format(tokens=16, batch=48, width=32, inner=64, layers=3, heads=4)
    (folder / "case.yaml").write_text(text.replace("sample_break_mode: none", "sample_break_mode: eos"))
    config, _ = load_config(
        str(folder), "case", [f"task.data={folder}", f"common.seed={SEED}", "dataset.required_batch_size_multiple=1"]
    )

    def steps(epoch: int, first: int, rank: int, ranks: int) -> Steps:
        data = PretrainingData(config, rank, ranks)
        return [batch.id.tolist() for batch in data.train_batches(epoch + 1, first).loader(0)]

    return steps


@pytest.fixture(params=["ViT", "BEiT v2", "CLIP", "CLIP, drop_last", "data2vec"])
def loader(request, vit_loader, clip_keys, data2vec_loader) -> tuple[Loader, Callable[[int], int]]:
    """A project's loader, and how many samples an epoch over so many ranks has."""
    whole = lambda ranks: SAMPLES // (BATCH * ranks) * BATCH * ranks  # noqa: E731
    return {
        "ViT": (vit_loader, whole),
        "BEiT v2": (beit2_steps, whole),
        "CLIP": (partial(clip_steps, clip_keys, False), lambda ranks: SAMPLES // ranks * ranks),
        "CLIP, drop_last": (partial(clip_steps, clip_keys, True), whole),
        "data2vec": (data2vec_loader, lambda ranks: SAMPLES),
    }[request.param]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_an_epoch_without_overlap_and_in_equal_steps(loader, ranks):
    steps_of, expected = loader
    shares = [steps_of(0, 0, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1 and shares[0]
    seen = [sample for share in shares for step in share for sample in step]
    assert len(seen) == len(set(seen)) == expected(ranks)
    assert set(seen) <= set(range(SAMPLES))


def test_every_epoch_has_an_order_of_its_own_that_a_restart_finds_again(loader):
    steps_of, _ = loader
    first, second, third = (steps_of(epoch, 0, 1, 2) for epoch in range(3))
    assert first != second != third != first
    assert steps_of(1, 0, 1, 2) == second  # another process draws the same
    assert steps_of(1, 2, 1, 2) == second[2:]  # a restart goes on in its epoch, not in the first one's order
    assert second[2:] != first[2:]


def test_left_out_samples_differ_between_epochs(loader):
    steps_of, expected = loader
    if expected(8) == SAMPLES:
        pytest.skip("nothing is left out")
    seen = set()
    for epoch in range(12):
        seen |= {sample for rank in range(8) for step in steps_of(epoch, 0, rank, 8) for sample in step}
    assert seen == set(range(SAMPLES))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_of_vit_counts_every_picture_once(vit_loader, ranks):
    transform = EvalTransform(8)
    loaders = [
        EvalLoader(vit_loader.folder, transform, batch_size=BATCH, rank=rank, world_size=ranks) for rank in range(ranks)
    ]
    seen = [target for loader in loaders for batch in loader for target in batch.targets.tolist()]
    assert sorted(seen) == list(range(SAMPLES))
    # sharded models need equal steps: the rest are batches of no picture
    steps = [[len(batch.targets) for batch in loader.of_equal_length()] for loader in loaders]
    assert len({len(counts) for counts in steps}) == 1 and sum(map(sum, steps)) == SAMPLES


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(vit_loader, clip_keys):
    """ViT and CLIP: one rank with 6 samples a step and two with 3 see the same samples in every step."""
    clip = partial(clip_steps, clip_keys, True)
    for steps_of in (vit_loader, clip):
        two = [set(a) | set(b) for a, b in zip(steps_of(0, 0, 0, 2), steps_of(0, 0, 1, 2), strict=True)]
        one = steps_of(0, 0, 0, 1)
        one = [set(one[n]) | set(one[n + 1]) for n in range(0, 2 * len(two), 2)]
        assert one == two
