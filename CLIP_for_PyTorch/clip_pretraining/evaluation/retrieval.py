"""Retrieval recall with several captions per picture (the COCO protocol: five)."""

from __future__ import annotations

import torch


def recall_at_k(
    image: torch.Tensor,
    text: torch.Tensor,
    image_index_of_text: torch.Tensor,
    chunk: int = 1024,
    tie_share: float = 0.0,
) -> dict[str, float]:
    """R@1, R@5, R@10, mean and median rank in both directions.

    A text's rank is the number of pictures that score strictly higher than its own; a picture's rank is the number of
    texts that score strictly higher than the best of its own texts; of others that score the same, `tie_share` counts
    too. Reported ranks count from 1, the median is floored.

    Args:
        image: [I, d] L2-normalised.
        text: [T, d] L2-normalised, in any order.
        image_index_of_text: int [T], the row of `image` each text describes. A picture without a text is a distractor.
        chunk: rows scored at a time.
        tie_share: 0 is the published protocol, in which a model that gives everything the same features is perfect;
            0.5 gives it what guessing gives.

    Returns:
        {image_to_text,text_to_image}_{R@1,R@5,R@10,mean_rank,median_rank}
    """
    i2t, t2i = ranks(image, text, image_index_of_text, chunk, tie_share)
    return {**_summary("image_to_text", i2t), **_summary("text_to_image", t2i)}


def ranks(
    image: torch.Tensor,
    text: torch.Tensor,
    image_index_of_text: torch.Tensor,
    chunk: int = 1024,
    tie_share: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """0-based float64 ranks: of each picture that has a text ([I'], in picture order), and of each text ([T])."""
    owner = torch.as_tensor(image_index_of_text, device=text.device).long()
    if len(owner) != len(text):
        raise ValueError(f"image_index_of_text has {len(owner)} entries for {len(text)} texts")
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < len(image):
        raise ValueError(f"image_index_of_text must lie in 0..{len(image) - 1}")

    t2i = torch.empty(len(text), dtype=torch.float64)
    for start in range(0, len(text), chunk):
        scores = text[start : start + chunk] @ image.T  # [c, I]
        own = scores.gather(1, owner[start : start + chunk, None])  # [c, 1]
        equal = (scores == own).sum(1) - 1  # its own picture is one of them
        t2i[start : start + chunk] = ((scores > own).sum(1) + tie_share * equal).cpu()

    described = torch.unique(owner)  # sorted
    i2t = torch.empty(len(described), dtype=torch.float64)
    for start in range(0, len(described), chunk):
        rows = described[start : start + chunk]
        scores = image[rows] @ text.T  # [c, T]
        own_text = owner[None, :] == rows[:, None]  # [c, T]
        best = scores.masked_fill(~own_text, float("-inf")).amax(1, keepdim=True)
        equal = ((scores == best) & ~own_text).sum(1)
        i2t[start : start + chunk] = ((scores > best).sum(1) + tie_share * equal).cpu()
    return i2t, t2i


def _summary(name: str, rank: torch.Tensor) -> dict[str, float]:
    recall = {f"{name}_R@{k}": float((rank < k).double().mean()) for k in (1, 5, 10)}
    return {
        **recall,
        f"{name}_mean_rank": float(rank.mean() + 1),
        # numpy's median: the mean of the two middle values for an even count
        f"{name}_median_rank": float(torch.quantile(rank, 0.5).floor() + 1),
    }
