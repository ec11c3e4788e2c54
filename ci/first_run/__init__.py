"""A first day on a card in one command: `make first-run DEVICE=npu`."""
