"""How alike the first sentences of a corpus are to a trained data2vec: text_features.py CHECKPOINT DATA_BIN"""

import sys
from pathlib import Path

import torch

from data2vec import IndexedDataset
from data2vec.weights.pretrained import load_pretrained

checkpoint, folder = sys.argv[1:3]
student = load_pretrained(Path(checkpoint)).teacher_holder.student.eval()
corpus = IndexedDataset(Path(folder) / "train")
with torch.no_grad():
    vectors = [student(corpus[i][None].long(), has_padding=False).mean(dim=1) for i in range(min(5, len(corpus)))]
vectors = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)  # [sentences, d]
print((vectors @ vectors.T).numpy().round(3))
