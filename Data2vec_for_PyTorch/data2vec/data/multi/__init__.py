"""Batches of data2vec 2.0: whole samples, and several masks for each."""
