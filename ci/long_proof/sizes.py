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
        fine_tuning: epochs over all pictures' worth of labels; a share has them more often, see `epochs_of_share`.
        vit, clip: epochs over all pictures.
        model: the encoder of BEiT v2 and data2vec: width, depth and heads.
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

    def epochs_of_share(self, share: int) -> int:
        """Of a fine-tuning on `share` percent of the labels: fewer pictures are seen more often, as the root."""
        return max(1, round(self.fine_tuning * (100 / share) ** 0.5))


SIZES = {
    # the whole path in a few minutes; its numbers mean nothing
    "quick": Size(
        pictures=600, held_out=200, tokenizer=1, pretraining=1, fine_tuning=1, vit=1, clip=1, batch=8, shares=(10, 50)
    ),
    # two hours on two idle cores by the speed of short runs; not run whole
    "cpu": Size(50_000, 10_000, tokenizer=1, pretraining=3, fine_tuning=1, vit=4, clip=2),
    # several hours on two cores, or one GPU; not run
    "large": Size(50_000, 10_000, tokenizer=4, pretraining=40, fine_tuning=6, vit=40, clip=10),
}
