"""Files of weights: kinds that are read, names elsewhere, where they are downloaded, what is written."""

from vit.weights.loading import HeadPolicy, load_weights, read_checkpoint, read_state_dict

__all__ = ["HeadPolicy", "load_weights", "read_checkpoint", "read_state_dict"]
