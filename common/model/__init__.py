"""What is done to a whole model whatever it computes: compiled blocks, LoRA's additions, patches for a device."""
