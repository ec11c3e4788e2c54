"""Corpora and pictures as batches of masked samples."""
