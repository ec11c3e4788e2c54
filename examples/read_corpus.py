"""The first sentences of a fairseq corpus, as words: read_corpus.py DATA_BIN"""

import sys
from pathlib import Path

from data2vec import Dictionary, IndexedDataset

folder = Path(sys.argv[1])
words = Dictionary.load(folder / "dict.txt")
corpus = IndexedDataset(folder / "train")
print(f"{len(corpus)} sentences, {len(words)} symbols")
for index in range(min(3, len(corpus))):
    print(index, " ".join(words[token] for token in corpus[index].tolist()))
