"""The tables of model names under the name at which outside code adds its own; the code is in `model/names.py`."""

from beit2.model.names import FINETUNING_MODELS, PRETRAINING_MODELS, TOKENIZERS, create_model, create_tokenizer

__all__ = ["FINETUNING_MODELS", "PRETRAINING_MODELS", "TOKENIZERS", "create_model", "create_tokenizer"]
