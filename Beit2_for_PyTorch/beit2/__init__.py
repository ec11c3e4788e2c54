"""BEiT v2: masked image modelling with the VQ-KD tokenizer."""

from common.data.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

from beit2.data.masking import MaskingGenerator
from beit2.model.convert import convert_pretrained
from beit2.model.masked_image_model import build_pretraining_model
from beit2.model.tokenizer import build_tokenizer
from beit2.model.vision_transformer import build_classifier
from beit2.model_names import create_model, create_tokenizer
from beit2.training.optimizers import parameter_groups
from beit2.training.schedule import cosine_schedule

__all__ = [
    "MaskingGenerator",
    "build_classifier",
    "build_pretraining_model",
    "build_tokenizer",
    "convert_pretrained",
    "cosine_schedule",
    "create_model",
    "create_tokenizer",
    "parameter_groups",
]
