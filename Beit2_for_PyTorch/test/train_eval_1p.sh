#!/usr/bin/env bash
# Fine-tunes a pretrained checkpoint on classes and reports its accuracy.
# Usage: bash test/train_eval_1p.sh --data_path=DIR --ckpt_path=FILE [--epochs=N ...]; DIR has train/ and val/
Network=Beit2_for_PyTorch; CaseKind=acc; RankSize=1
ExtraFlags="model log_dir"
data_path=""; ckpt_path=""; batch_size=64; epochs=100; model=beit_base_patch16_224
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path ckpt_path
# A training of its own: in the pretraining's folder it would go on from the pretraining's checkpoint.
: "${output_dir:=$project_dir/test/output/${device_id:-${ASCEND_DEVICE_ID:-0}}/finetuning}"
on_restart=(--resume auto)
warmup=$((epochs / 5)) # the recipe's 20 of 100 epochs
launch run_class_finetuning.py --data_path "$data_path/train" --eval_data_path "$data_path/val" --finetune "$ckpt_path" \
  ${log_dir:+--log_dir "$log_dir"} --model "$model" --batch_size "$batch_size" --epochs "$epochs" --warmup_epochs $warmup --layer_decay 0.6 --drop_path 0.2 \
  --mixup 0.8 --cutmix 1.0 --imagenet_default_mean_and_std
