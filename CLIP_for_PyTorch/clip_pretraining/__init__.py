"""CLIP on image-caption pairs: dual encoder (CLIP-ViT + RoBERTa) and CLIPModel, on the `transformers` Trainer."""

from common.data.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision: transformers does, for its image processors

from clip_pretraining.data.images import load_image  # noqa: E402
from clip_pretraining.evaluation.retrieval import recall_at_k  # noqa: E402
from clip_pretraining.model.loss import contrastive_loss, siglip_loss  # noqa: E402

__all__ = ["contrastive_loss", "load_image", "recall_at_k", "siglip_loss"]
