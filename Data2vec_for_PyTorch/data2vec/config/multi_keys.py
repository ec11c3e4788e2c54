"""Options of data2vec 2.0 (`data2vec_multi`), as `keys.py` has those of the others."""

from __future__ import annotations

from data2vec.config.option import Fixed, Ignored, Key, Option, count, number, positive, share
from data2vec.config.target_keys import TARGETS

_MASKS = Ignored("masks are the model's, model.modalities.text.mask_prob")

_MODEL: dict[str, Option] = {
    **TARGETS,
    # per_update as in the released code; ours: per_micro_batch
    "model.ema_steps": Key("per_update", choices=("per_update", "per_micro_batch")),
    "model.depth": positive(8),
    "model.embed_dim": positive(768),
    "model.num_heads": positive(12),
    "model.mlp_ratio": number(4.0, low=0.01),
    "model.norm_eps": number(1e-6),
    "model.norm_affine": Key(True),
    "model.layer_norm_first": Key(False),
    "model.end_of_block_targets": Key(False),
    "model.start_drop_path_rate": share(0.0),
    "model.end_drop_path_rate": share(0.0),
    "model.encoder_dropout": share(0.1),
    "model.attention_dropout": share(0.1),
    "model.activation_dropout": share(0.0),
    "model.post_mlp_drop": share(0.1),
    "model.dropout_input": share(0.0),
    "model.clone_batch": positive(1),
    "model.ema_encoder_only": Key(True),
    "model.cls_loss": number(0.0),
    "model.d2v_loss": number(1.0, low=1e-9),
    "model.recon_loss": Fixed(0),
    "model.layerdrop": Fixed(0),
    "model.mae_init": Fixed(False),
    "model.shared_decoder": Fixed(None),
    "model.skip_ema": Fixed(False),
    "model.decoder_group": Ignored("all parameters have one learning rate"),
    "model.ema_same_dtype": Ignored("the teacher is kept in fp32"),
    "model.checkpoint_activations": Key(False),  # ours
    "model.log_norms": Ignored("norms of the weights are not logged"),
    "model.min_target_var": Ignored("collapse is looked for with this project's limits"),
    "model.min_pred_var": Ignored("collapse is looked for with this project's limits"),
    "model.seed": Ignored("common.seed is used"),
    "model.max_update": Ignored("optimization.max_update is used"),
}

_ENCODER: dict[str, Option] = {
    "prenet_depth": count(4),
    "prenet_dropout": share(0.0),
    "prenet_layerdrop": Fixed(0),
    "start_drop_path_rate": share(0.0),
    "end_drop_path_rate": share(0.0),
    "num_extra_tokens": count(0),
    "init_extra_token_zero": Key(True),
    "mask_noise_std": number(0.01),
    "mask_prob": share(0.7),
    "mask_prob_min": Fixed(None),
    "keep_masked_pct": Fixed(0),
    "add_masks": Fixed(False),
    "remove_masks": Fixed(False),
    "mask_channel_prob": Fixed(0),
    "mask_channel_length": Ignored("no channels are masked"),
    "encoder_zero_mask": Ignored("no masked token enters the encoder"),
    "ema_local_encoder": Key(False),
    "local_grad_mult": Fixed(1),
    "use_alibi_encoder": Fixed(False),
    "type": Ignored("its group says it"),
    "model_depth": Ignored("model.depth is used"),
    "decoder.decoder_dim": positive(384),
    "decoder.decoder_groups": positive(16),
    "decoder.decoder_kernel": positive(5),
    "decoder.decoder_layers": positive(5),
    "decoder.decoder_residual": Key(True),
    "decoder.input_dropout": share(0.1),
    "decoder.projection_layers": positive(1),
    "decoder.projection_ratio": number(2.0, low=0.01),
    "decoder.add_positions_masked": Fixed(False),
    "decoder.add_positions_all": Fixed(False),
    "decoder.final_layer_norm": Fixed(False),
}
for _name in ("scale", "max_pos", "dims", "distance"):
    _ENCODER[f"alibi_{_name}"] = Ignored("there is no alibi encoder")
for _name in ("", "_scale", "_scale_per_head", "_scale_per_layer"):
    _ENCODER[f"learned_alibi{_name}"] = Ignored("there is no alibi encoder")
_ENCODER["num_alibi_heads"] = Ignored("there is no alibi encoder")

MULTI_TEXT: dict[str, Option] = {
    **{f"task.{name}": _MASKS for name in ("mask_prob", "leave_unmasked_prob", "random_token_prob")},
    **{f"task.{name}": _MASKS for name in ("freq_weighted_replacement", "mask_multiple_length", "mask_stdev")},
    "task.include_target_tokens": Ignored("the model is given whole texts"),
    "task.skip_masking": Fixed(True),
    "task.d2v2_multi": Fixed(True),
    **_MODEL,
    "model.supported_modality": Key("TEXT", choices=("TEXT",)),
    **{f"model.modalities.text.{name}": option for name, option in _ENCODER.items()},
    "model.modalities.text.mask_length": Key(5, choices=(1,)),  # single tokens alone; fairseq's default is a span
    "model.modalities.text.inverse_mask": Fixed(False),
    "model.modalities.text.mask_prob_adjust": Fixed(0),
    "model.modalities.text.mask_dropout": Fixed(0),
    "model.modalities.text.max_source_positions": positive(512),
    "model.modalities.text.dropout": share(0.1),
    "model.modalities.text.learned_pos": Fixed(True),
    "model.modalities.text.no_scale_embedding": Key(True),
    "model.modalities.text.layernorm_embedding": Key(True),
    "model.modalities.text.no_token_positional_embeddings": Fixed(False),
}

MULTI_VISION: dict[str, Option] = {
    "task.key": Ignored("pictures are in a folder"),
    "task.local_cache_path": Ignored("pictures are read where they are"),
    "task.rebuild_batches": Ignored("batches are the same in every epoch"),
    "task.seed": Ignored("common.seed is used"),
    "task.multi_data": Fixed(None),
    "task.subsample": Fixed(1),
    "task.dataset_type": Fixed("imagefolder"),
    "task.beit_transforms": Fixed(False),
    "task.target_transform": Fixed(False),
    "task.no_transform": Fixed(False),
    "task.precompute_mask_config": Ignored("masks are made by the loader, as the model's options say"),
    "task.precompute_mask_config.expand_adjacent": Fixed(False),
    "task.precompute_mask_config.non_overlapping": Fixed(False),
    **_MODEL,
    "model.supported_modality": Key("IMAGE", choices=("IMAGE",)),
    **{f"model.modalities.image.{name}": option for name, option in _ENCODER.items()},
    "model.modalities.image.mask_length": positive(5),
    "model.modalities.image.inverse_mask": Key(False),
    "model.modalities.image.mask_prob_adjust": Key(0.0),
    "model.modalities.image.mask_dropout": share(0.0),
    "model.modalities.image.input_size": positive(224),
    "model.modalities.image.in_chans": Key(3, choices=(3,)),
    "model.modalities.image.patch_size": positive(16),
    "model.modalities.image.embed_dim": positive(None),  # null: model.embed_dim; fairseq's is 768, of any model
    "model.modalities.image.fixed_positions": Fixed(True),
    "model.modalities.image.transformer_decoder": Fixed(False),
    "model.modalities.image.enc_dec_transformer": Fixed(False),
}
