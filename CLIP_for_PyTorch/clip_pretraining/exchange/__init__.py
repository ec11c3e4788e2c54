"""Whole models from and for other programs: open_clip, OpenAI's clip, transformers, ONNX."""
