"""The real torch_npu 2.13 on stand-in CANN libraries: its names, schemas and shapes without a card."""
