#!/usr/bin/env bash
# Pretrains beit_huge_5B_cls_pt on eight cards, sharded (FSDP2), by the README's settings.
# Usage: bash pretraining.sh [--data_path=DIR --tokenizer_weight=FILE --batch_size=N --epochs=N ...]
Network=Beit2_for_PyTorch; CaseKind=acc; RankSize=8
ExtraFlags="tokenizer_weight log_dir"
batch_size=120; epochs=1600
data_path=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../dataset/coco2017
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
on_restart=(--resume auto)
launch run_beitv2_pretraining.py --data_path "$data_path" --batch_size "$batch_size" --epochs "$epochs" \
  --model beit_huge_5B_cls_pt --parallel fsdp --activation_checkpointing --early_layers 6 --head_layers 2 \
  ${tokenizer_weight:+--tokenizer_weight "$tokenizer_weight"} ${ckpt_path:+--resume "$ckpt_path"} \
  ${log_dir:+--log_dir "$log_dir"} --layer_scale_init_value 1e-5 --second_interpolation bicubic --min_crop_scale 0.2 --lr 3e-4 --warmup_epochs 10 \
  --clip_grad 3.0 --imagenet_default_mean_and_std --opt_betas 0.9 0.999
