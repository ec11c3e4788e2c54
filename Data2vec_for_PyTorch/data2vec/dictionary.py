"""The vocabulary file, under the name that outside code imports."""

from data2vec.data.dictionary import MASK, Dictionary

__all__ = ["MASK", "Dictionary"]
