"""data2vec: self-supervised pretraining on text (and images) by predicting a teacher's latent representations."""

from common.data.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

from data2vec.data.batching import batch_by_size
from data2vec.data.dictionary import Dictionary
from data2vec.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from data2vec.data.masking import mask_tokens
from data2vec.data.token_blocks import TokenBlockDataset
from data2vec.model.ema import ema_decay_at, ema_step
from data2vec.model.text_model import Data2VecText, build_model
from data2vec.training.optimizer import FairseqAdam, cosine_lr

__all__ = [
    "Data2VecText",
    "Dictionary",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "TokenBlockDataset",
    "FairseqAdam",
    "batch_by_size",
    "build_model",
    "cosine_lr",
    "ema_decay_at",
    "ema_step",
    "mask_tokens",
]
