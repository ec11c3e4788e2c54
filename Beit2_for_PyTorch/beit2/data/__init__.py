"""Pictures: found, decoded, augmented, masked and batched."""
