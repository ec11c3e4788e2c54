"""What this repository calls of torch_npu, checked against the real wheels without importing them."""
