"""Names what is on pictures: classify.py CHECKPOINT PICTURE..."""

import sys

from vit import load_image, pipeline

checkpoint, *pictures = sys.argv[1:]
classify = pipeline("image_classification", model=checkpoint)
for path in pictures:
    best = classify(load_image(path), top_k=3)[0]
    print(path, ", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in best))
