"""data2vec: self-supervised pretraining on text (and images) by predicting a teacher's latent representations."""

from common.device import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

from data2vec.batching import batch_by_size
from data2vec.dictionary import Dictionary
from data2vec.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from data2vec.masking import mask_tokens
from data2vec.token_blocks import TokenBlockDataset

__all__ = [
    "Dictionary",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "TokenBlockDataset",
    "batch_by_size",
    "mask_tokens",
]
