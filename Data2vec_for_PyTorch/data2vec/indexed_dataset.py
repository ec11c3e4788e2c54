"""fairseq's corpus format, under the name that outside code imports."""

from data2vec.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, best_fitting_int_dtype, write_corpus

__all__ = ["IndexedDataset", "IndexedDatasetBuilder", "best_fitting_int_dtype", "write_corpus"]
