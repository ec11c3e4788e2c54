"""The pictures that fit a sentence best: search_pictures.py MODEL_FOLDER SENTENCE PICTURE..."""

import sys

import torch

from clip_pretraining import load_image
from clip_pretraining.data.tokenization import load_tokenizer
from clip_pretraining.evaluation.encoder import normalise_pixels
from clip_pretraining.model.loading import encode_images, encode_texts, image_settings, load_model

folder, sentence, *pictures = sys.argv[1:]
model = load_model(folder).eval()
settings = image_settings(folder, model.config)
pixels = torch.stack([load_image(path, settings.size) for path in pictures])  # uint8 [N, 3, S, S]
words = load_tokenizer(folder)(sentence, return_tensors="pt")
with torch.no_grad():
    images = encode_images(model, normalise_pixels(pixels, torch.tensor(settings.mean), torch.tensor(settings.std)))
    text = encode_texts(model, words["input_ids"], words["attention_mask"])  # [1, d]
for score, path in sorted(zip((images @ text.T).flatten().tolist(), pictures, strict=True), reverse=True):
    print(f"{score:.3f} {path}")
