"""How long everything trains, and on how much: a line a size, chosen for a machine and a patience."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (1, 10, 50, 100)  # percent of the labels


@dataclass(frozen=True)
class Size:
    """Lengths of the trainings.

    Attributes:
        pictures: to train on, of all classes together; the labels are shares of these.
        held_out: pictures that are asked about.
        tokenizer, pretraining: epochs over all pictures, without labels.
        fine_tuning, vit: epochs on all labels; a share of them has more, see `epochs_of_share`.
        clip: epochs over all pictures.
        batch: of all trainings; rates are those of a batch of 64.
        shares: of the labels, in percent, on which classifiers are trained.
    """

    pictures: int
    held_out: int
    tokenizer: int
    pretraining: int
    fine_tuning: int
    vit: int
    clip: int
    batch: int = 64
    shares: tuple[int, ...] = SHARES


def epochs_of_share(whole: int, share: int) -> int:
    """Of a training on `share` percent of the labels that has `whole` epochs on all of them.

    A hundredth of the pictures is seen 32 times as often, which takes a third of the time.
    """
    return max(1, round(whole * (100 / share) ** 0.75))


SIZES = {
    # the whole path in a few minutes; its numbers mean nothing
    "quick": Size(
        pictures=600, held_out=200, tokenizer=1, pretraining=1, fine_tuning=1, vit=1, clip=1, batch=8, shares=(10, 50)
    ),
    # 155 CPU minutes (2026-11-29)
    "cpu": Size(50_000, 10_000, tokenizer=1, pretraining=3, fine_tuning=1, vit=2, clip=2),
    # several hours on two cores, or one GPU; not run
    "large": Size(50_000, 10_000, tokenizer=4, pretraining=40, fine_tuning=6, vit=40, clip=10),
}
