"""Configurations in fairseq's form."""

from data2vec.config.loading import adam_betas, check_config, checkpoint_path, load_config

__all__ = ["adam_betas", "check_config", "checkpoint_path", "load_config"]
