"""ViT for PyTorch: MAE-style fine-tuning of Vision Transformers. Names are imported on first use."""

import importlib

from common.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

_MODULE_OF = {
    "build_model": "vit.model",
    "create_model": "vit.model",
    "model_names": "vit.model",
    "load_weights": "vit.weights",
    "layer_decay_groups": "vit.optim",
    "learning_rate_at": "vit.schedule",
    "topk_counts": "vit.metrics",
    "AutoConfig": "vit.auto",
    "AutoModel": "vit.auto",
    "ViTConfig": "vit.auto",
    "ViTImageProcessor": "vit.image_processor",
    "load_image": "vit.image_processor",
    "pipeline": "vit.predictor",
    "Trainer": "vit.trainer",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
