"""Does pretraining without labels pay on photographs? An hour or two on CIFAR-10, stage by stage."""
