"""A picture's visual tokens, the grid that BEiT v2 learns to predict: visual_tokens.py TOKENIZER_FILE PICTURE [NAME]"""

import sys

import numpy as np
import torch
from PIL import Image

from beit2 import create_tokenizer

weights, picture = sys.argv[1:3]
name = sys.argv[3] if len(sys.argv) > 3 else "vqkd_encoder_base_decoder_3x768x12_clip"
tokenizer = create_tokenizer(name, weights=weights).eval()
pixels = np.asarray(Image.open(picture).convert("RGB").resize((224, 224)))
image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255  # [1, 3, 224, 224]
with torch.no_grad():
    tokens = tokenizer.get_codebook_indices(image)  # [1, 196]
side = int(tokens.numel() ** 0.5)
print(tokens.view(side, side).numpy())
