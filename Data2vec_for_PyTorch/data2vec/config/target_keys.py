"""Options that all pretraining models share: the loss, the teacher's targets, and how the teacher follows."""

from __future__ import annotations

from data2vec.config.option import Key, Option, count, number, positive, share

TARGETS: dict[str, Option] = {
    "model.loss_beta": number(0.0),
    "model.loss_scale": Key(None, kind=float),  # fairseq crashes on null; here it means 1 / sqrt(C)
    "model.average_top_k_layers": positive(8),
    "model.layer_norm_target_layer": Key(False),
    "model.instance_norm_target_layer": Key(False),
    "model.batch_norm_target_layer": Key(False),
    "model.instance_norm_targets": Key(False),
    "model.layer_norm_targets": Key(False),
    "model.ema_decay": share(0.999),
    "model.ema_end_decay": share(0.9999),
    "model.ema_anneal_end_step": count(None),  # null: optimization.max_update
    "model.init_std": number(0.02, low=1e-6),  # ours: BERT's 0.02 fits a width of 768, a narrow model needs more
    # ours: per_micro_batch (the released code) or per_update (update_freq k equals k ranks)
    "model.ema_steps": Key("per_micro_batch", choices=("per_micro_batch", "per_update")),
}
