"""What is done to a whole model whatever it computes: compiled blocks, LoRA's additions."""
