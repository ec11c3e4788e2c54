"""Every option, described once: its default, its values, or why it has no effect. Groups and names are fairseq's.

Where an option is ours, or a value means more than in fairseq, a comment says so. What an option is for stands in
fairseq's documentation and in the README.
"""

from __future__ import annotations

from collections.abc import Mapping

from data2vec.config.multi_keys import MULTI_TEXT, MULTI_VISION
from data2vec.config.option import MISSING, Fixed, Ignored, Key, Option, count, number, positive, share
from data2vec.config.target_keys import TARGETS

MULTI = "data2vec_multi"
TASKS = ("masked_lm", "image_pretraining", "mae_image_pretraining")
MODELS = ("data2vec_text", "data2vec_vision", MULTI)
FULLY_SHARDED = "fully_sharded"  # FSDP2
DDP_BACKENDS = ("c10d", "legacy_ddp", "no_c10d", "pytorch_ddp", FULLY_SHARDED)
PICTURES = ("image_pretraining", "mae_image_pretraining")  # tasks
REGRESSION_METRICS = ("pearson", "spearman", "pearson_and_spearman")

_COMMON: dict[str, Option] = {
    "common.seed": count(1),
    "common.log_interval": positive(100),
    "common.log_format": Key("json", null=True),
    "common.fp16": Key(False),
    "common.bf16": Key(False),
    "common.fp16_init_scale": number(128.0, low=2**-14),
    "common.fp16_scale_window": positive(None),
    "common.fp16_scale_tolerance": share(0.0),
    "common.min_loss_scale": number(0.0001),
    "common.threshold_loss_scale": number(None),
    "common.cpu": Key(False),
    "common.user_dir": Ignored("the model is part of this project"),
    "common.tensorboard_logdir": Ignored("TensorBoard files go to --output_dir/tensorboard"),
    "common.no_progress_bar": Ignored("the progress bar shows on a terminal only"),
    "common.log_file": Ignored("the launcher writes train_<device>.log"),
    "common.fp16_no_flatten_grads": Ignored("weights are in fp32, each for itself"),
    "common.empty_cache_freq": Ignored("memory is not emptied between steps"),
    "common.all_gather_list_size": Ignored("there is no such buffer here"),
    "common.suppress_crashes": Ignored("a crash is reported as one"),
    "common.amp": Fixed(False),
    "common.tpu": Fixed(False),
    "common.memory_efficient_fp16": Fixed(False),
    "common.memory_efficient_bf16": Fixed(False),
    "common.model_parallel_size": Fixed(1),
    "common.quantization_config_path": Fixed(None),
    "common_eval.path": Key(None, kind=str),
    "distributed_training.distributed_world_size": positive(1),
    "distributed_training.ddp_backend": Key("legacy_ddp", choices=DDP_BACKENDS),
    "distributed_training.distributed_backend": Ignored("the backend follows from the device"),
    "distributed_training.distributed_port": Ignored("torchrun chooses it"),
    "distributed_training.distributed_no_spawn": Ignored("torchrun starts the processes"),
    "distributed_training.device_id": Ignored("the device follows from the local rank"),
    "distributed_training.nprocs_per_node": Ignored("torchrun --nproc_per_node says it"),
    "distributed_training.find_unused_parameters": Ignored("gradients are reduced in one flat buffer"),
    "distributed_training.bucket_cap_mb": Ignored("gradients are reduced in one flat buffer"),
    "distributed_training.broadcast_buffers": Ignored("there are no buffers to broadcast"),
}

_DATASET: dict[str, Option] = {
    "dataset.num_workers": count(1),
    "dataset.max_tokens": positive(None),
    "dataset.batch_size": positive(None),
    "dataset.required_batch_size_multiple": positive(8),
    "dataset.required_seq_len_multiple": positive(1),
    "dataset.train_subset": Key("train"),
    "dataset.valid_subset": Key("valid"),
    "dataset.skip_invalid_size_inputs_valid_test": Key(False),
    "dataset.max_tokens_valid": positive(None),
    "dataset.batch_size_valid": positive(None),
    "dataset.validate_interval": count(1),
    "dataset.validate_interval_updates": count(0),
    "dataset.validate_after_updates": count(0),
    "dataset.disable_validation": Key(False),
    "dataset.max_valid_steps": positive(None),
    "dataset.data_buffer_size": Ignored("each loader worker keeps two batches ready"),
    "dataset.ignore_unused_valid_subsets": Ignored("only dataset.valid_subset is read"),
    "dataset.fixed_validation_seed": Ignored("validation draws nothing"),
    "dataset.dataset_impl": Ignored("the index file says what it is"),
    "dataset.curriculum": Fixed(0),
    "dataset.num_shards": Fixed(1),
    "dataset.shard_id": Fixed(0),
    "dataset.grouped_shuffling": Fixed(False),
    "dataset.update_epoch_batch_itr": Fixed(False),
    "dataset.update_ordered_indices_seed": Fixed(False),
    "dataset.combine_valid_subsets": Fixed(None),
}

_TRAINING: dict[str, Option] = {
    "optimization.max_epoch": count(0),
    "optimization.max_update": Key(0, low=1),  # the schedule ends there; no default
    "optimization.clip_norm": number(0.0),
    "optimization.update_freq": Key([1], low=1),
    "optimization.lr": Key([0.25], low=0),
    "optimization.stop_time_hours": number(0.0),
    "optimization.debug_param_names": Ignored("messages name parameters"),
    "optimization.sentence_avg": Fixed(False),
    "optimization.stop_min_lr": Fixed(-1.0),
    "optimization.use_bmuf": Fixed(False),
    "optimization.skip_remainder_batch": Fixed(False),
    "checkpoint.save_dir": Key("checkpoints"),
    "checkpoint.restore_file": Key("checkpoint_last.pt", null=True),
    "checkpoint.finetune_from_model": Key(None, kind=str),
    "checkpoint.save_interval": count(1),
    "checkpoint.save_interval_updates": count(0),
    "checkpoint.keep_interval_updates": Key(-1, low=-1),
    "checkpoint.no_epoch_checkpoints": Key(False),
    "checkpoint.no_save": Key(False),
    "checkpoint.reset_optimizer": Key(False),
    "checkpoint.reset_dataloader": Key(False),
    "checkpoint.reset_lr_scheduler": Ignored("the schedule follows from the number of updates"),
    "checkpoint.best_checkpoint_metric": Fixed("loss"),
    "checkpoint.maximize_best_checkpoint_metric": Fixed(False),
    "checkpoint.keep_last_epochs": Fixed(-1),
    "checkpoint.keep_best_checkpoints": Fixed(-1),
    "checkpoint.keep_interval_updates_pattern": Fixed(-1),
    "checkpoint.no_last_checkpoints": Fixed(False),
    "checkpoint.no_save_optimizer_state": Fixed(False),
    "checkpoint.optimizer_overrides": Fixed("{}"),
    "checkpoint.patience": Fixed(-1),
    "checkpoint.reset_meters": Fixed(False),
    "optimizer._name": Key("adam", choices=("adam",)),
    "optimizer.adam_betas": Key("(0.9, 0.999)", kind=tuple),  # a string or a list: `adam_betas` reads it
    "optimizer.adam_eps": number(1e-8),
    "optimizer.weight_decay": number(0.0),
    "optimizer.use_old_adam": Fixed(False),
    "optimizer.fp16_adam_stats": Fixed(False),
    "lr_scheduler._name": Key("cosine", choices=("cosine",)),
    "lr_scheduler.warmup_updates": count(0),
    "lr_scheduler.warmup_init_lr": number(-1.0, low=-1),
    "lr_scheduler.min_lr": number(0.0),
    "lr_scheduler.t_mult": number(1.0, low=1),
    "lr_scheduler.lr_period_updates": number(-1.0, low=-1),
    "lr_scheduler.lr_shrink": share(0.1),
    "criterion._name": Key("model", choices=("model",)),
    "criterion.log_keys": Ignored("what is logged is fixed"),
    "criterion.can_sum": Ignored("losses are summed"),
    "criterion.loss_weights": Fixed({}),
}

_TEXT: dict[str, Option] = {
    "task._name": Key("masked_lm", choices=TASKS),
    "task.data": Key(MISSING),
    "task.sample_break_mode": Key("none", null=True, choices=("none", "complete", "complete_doc", "eos")),
    "task.tokens_per_sample": Key(1024, low=2),  # <s> and a token
    "task.mask_prob": share(0.15),
    "task.leave_unmasked_prob": share(0.1),
    "task.random_token_prob": share(0.1),
    "task.freq_weighted_replacement": Key(False),
    "task.mask_multiple_length": positive(1),
    "task.mask_stdev": number(0.0),
    "task.include_target_tokens": Key(False),
    "task.include_index": Ignored("the sample's index always travels with it"),
    "task.seed": Ignored("common.seed is used"),
    "task.mask_whole_words": Fixed(False),
    "task.shorten_method": Fixed("none"),
    "task.shorten_data_split_list": Fixed(""),
    "task.skip_masking": Fixed(False),
    "task.d2v2_multi": Fixed(False),
    "model._name": Key("data2vec_text", choices=MODELS),
    "model.head_layers": positive(1),
    **TARGETS,
    "model.ema_transformer_layers_only": Key(True),
    "model.max_positions": Key(None, low=2, kind=int),  # longer samples are left out; null: task.tokens_per_sample
    # ours: masked_only (the released code) or full (the paper)
    "model.teacher_input": Key("masked_only", choices=("masked_only", "full")),
    "model.initial_attention": Key("random", choices=("random", "neighbours")),  # ours
    "model.load_checkpoint_heads": Ignored("the head is loaded when the checkpoint has one"),
    "model.transformer.activation_fn": Key("gelu"),
    "model.transformer.dropout": share(0.1),
    "model.transformer.attention_dropout": share(0.0),
    "model.transformer.activation_dropout": share(0.0),
    "model.transformer.relu_dropout": share(0.0),
    "model.transformer.layernorm_embedding": Key(False),
    "model.transformer.no_scale_embedding": Key(False),
    "model.transformer.max_source_positions": positive(512),
    "model.transformer.adaptive_input": Fixed(False),
    "model.transformer.checkpoint_activations": Key(False),
    "model.transformer.no_token_positional_embeddings": Fixed(False),
    "model.transformer.encoder.embed_dim": positive(512),
    "model.transformer.encoder.ffn_embed_dim": positive(2048),
    "model.transformer.encoder.layers": positive(6),
    "model.transformer.encoder.attention_heads": positive(8),
    "model.transformer.encoder.normalize_before": Key(False),
    "model.transformer.encoder.learned_pos": Key(False),
    "model.transformer.encoder.layerdrop": share(0.0),
    "model.transformer.encoder.layers_to_keep": Fixed(None),
    "model.transformer.encoder.embed_path": Fixed(None),
    "model.transformer.encoder.xformers_att_config": Fixed(None),
}

_VISION: dict[str, Option] = {
    "task._name": _TEXT["task._name"],
    "task.data": Key(MISSING),
    "task.input_size": positive(224),
    "task.normalization_mean": Key([0.485, 0.456, 0.406]),
    "task.normalization_std": Key([0.229, 0.224, 0.225], low=1e-6),
    "model._name": _TEXT["model._name"],
    "model.image_size": positive(224),
    "model.patch_size": positive(16),
    "model.in_channels": positive(3),
    "model.embed_dim": positive(768),
    "model.depth": positive(12),
    "model.num_heads": positive(12),
    "model.mlp_ratio": number(4.0, low=0.01),
    "model.layer_scale_init_value": number(0.0001, null=True),
    "model.shared_rel_pos_bias": Key(True),
    "model.drop_path": share(0.1),
    "model.attention_dropout": share(0.0),
    "model.num_mask_patches": Key(75),
    "model.min_mask_patches_per_block": positive(16),
    "model.max_mask_patches_per_block": positive(196),
    **TARGETS,  # loss_scale null: 1 / sqrt(C); 0 or below: 1
    "model.end_of_block_targets": Key(True),
    "model.ema_transformer_only": Key(True),
    "model.checkpoint_activations": Key(False),  # ours
    "model.norm_eps": number(0.00001),  # ours: of the LayerNorms; fairseq's 1e-5, the paper's code has 1e-6
    # ours: false leaves the linear head out of the forward pass, as fairseq's code does by oversight
    "model.use_final_proj": Key(True),
}


# finetune.py: fairseq's sentence_prediction, on tables instead of binarized files
_SENTENCES: dict[str, Option] = {
    "task._name": Key("sentence_prediction", choices=("sentence_prediction",)),
    "task.data": Key(MISSING),  # ours: a folder with train.csv, .tsv or .jsonl, and valid likewise
    "task.columns": Key(["sentence"]),  # ours: of the text, or of the two texts of a pair
    "task.label_column": Key("label"),  # ours
    "task.num_classes": Key(None, low=1, kind=int),  # null: as many as train has labels; of a regression 1 or null
    "task.regression_target": Key(False),
    "task.encoder_json": Key(None, kind=str),  # ours, as of bpe_encode.py
    "task.vocab_bpe": Key(None, kind=str),  # ours
    "task.dict": Key(None, kind=str),  # ours: dict.txt of the pretraining corpus
    "task.max_positions": Key(512, low=4),  # longer texts are cut
    "task.init_token": Fixed(0),
    "task.separator_token": Fixed(2),
    "task.seed": _TEXT["task.seed"],
    "task.d2v2_multi": Ignored("the checkpoint says what it is"),
    "task.shorten_method": Ignored("texts are cut at task.max_positions, and the log says how many"),
    "criterion._name": Key("sentence_prediction", choices=("sentence_prediction",)),
    "criterion.regression_target": Key(False),  # where fairseq has it; the same as task.regression_target
    "criterion.report_mcc": Ignored("all metrics are reported"),
    "criterion.report_acc_and_f1": Ignored("all metrics are reported"),
    "criterion.report_pearson_and_spearman": Ignored("all metrics are reported"),
    "optimization.max_update": count(0),  # 0: optimization.max_epoch says it
    "lr_scheduler._name": Key("polynomial_decay", choices=("polynomial_decay",)),
    "lr_scheduler.warmup_updates": count(None),  # null: lr_scheduler.warmup_ratio of all updates
    "lr_scheduler.warmup_ratio": share(0.06),  # ours
    "lr_scheduler.end_learning_rate": number(0.0),
    "lr_scheduler.power": number(1.0),
    "lr_scheduler.total_num_update": Ignored("the decay ends with the run, optimization.max_update"),
    "lr_scheduler.force_anneal": Fixed(None),
    # null: accuracy, or pearson of a regression
    "checkpoint.best_checkpoint_metric": Key(
        None, kind=str, choices=("loss", "accuracy", "f1", "mcc", "acc_and_f1", *REGRESSION_METRICS)
    ),
    "checkpoint.maximize_best_checkpoint_metric": Ignored("the metric says it"),
    "model._name": Key("data2vec_text_classification", choices=("data2vec_text_classification",)),
    "model.model_path": Ignored("checkpoint.finetune_from_model names the pretrained weights"),
    "model.pooler_dropout": share(0.0),
    "model.init_std": number(0.02, low=1e-6),  # ours
    **{key: option for key, option in _TEXT.items() if key.startswith("model.transformer.")},
}


_NAMES = {key: _TEXT[key] for key in ("task._name", "task.data", "model._name")}
_MULTI_OF_TEXT = {**_NAMES, **{key: _TEXT[key] for key in ("task.sample_break_mode", "task.tokens_per_sample")}}
_MULTI_OF_TEXT |= {key: _TEXT[key] for key in ("task.include_index", "task.seed", "task.mask_whole_words")}
_MULTI_OF_TEXT |= {key: _TEXT[key] for key in ("task.shorten_method", "task.shorten_data_split_list")} | MULTI_TEXT
_SEEN = ("task.input_size", "task.normalization_mean", "task.normalization_std")
_MULTI_OF_PICTURES = {**_NAMES, **{key: _VISION[key] for key in _SEEN}, **MULTI_VISION}


def options_of(task: str | None, model: str | None = None) -> Mapping[str, Option]:
    """All options of a task and model, of text where they are no known ones; names with their group."""
    if model == MULTI:
        own = _MULTI_OF_PICTURES if task in PICTURES else _MULTI_OF_TEXT
    else:
        own = {"image_pretraining": _VISION, "sentence_prediction": _SENTENCES}.get(task, _TEXT)
    return _COMMON | _DATASET | _TRAINING | own
