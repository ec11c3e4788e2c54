"""ViT for PyTorch: MAE-style fine-tuning of Vision Transformers. Names are imported on first use."""

import importlib

from common.data.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

_MODULE_OF = {
    "build_model": "vit.model.vision_transformer",
    "create_model": "vit.model.vision_transformer",
    "load_weights": "vit.weights.loading",
    "layer_decay_groups": "vit.training.optim",
    "learning_rate_at": "vit.training.schedule",
    "topk_counts": "vit.training.metrics",
    "AutoConfig": "vit.api.auto",
    "AutoModel": "vit.api.auto",
    "AutoProcessor": "vit.api.auto",
    "ViTForImageClassification": "vit.api.auto",
    "ViTModel": "vit.api.auto",
    "ViTProcessor": "vit.api.auto",
    "ViTConfig": "vit.model.vision_transformer",
    "ViTImageProcessor": "vit.api.image_processor",
    "load_image": "vit.api.image_processor",
    "pipeline": "vit.api.predictor",
    "save_pretrained": "vit.weights.hub_files",
    "Trainer": "vit.api.trainer",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
