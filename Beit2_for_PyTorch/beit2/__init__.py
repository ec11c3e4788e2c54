"""BEiT v2: masked image modelling with the VQ-KD tokenizer."""

from common.torchvision_repair import repair_torchvision

repair_torchvision()  # before anything imports torchvision or timm

from beit2.convert import convert_pretrained
from beit2.masking import MaskingGenerator
from beit2.model_names import create_model, create_tokenizer
from beit2.optimizers import parameter_groups
from beit2.pretraining_model import build_pretraining_model
from beit2.schedule import cosine_schedule
from beit2.tokenizer import build_tokenizer
from beit2.vision_transformer import build_classifier

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
