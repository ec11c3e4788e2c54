"""Pictures: folders, augmentation, batches, mixing."""
