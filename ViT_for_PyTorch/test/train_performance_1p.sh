#!/usr/bin/env bash
# Speed of ViT-B/16 training on 1 device: a short run, no evaluation.
# Usage: bash test/train_performance_1p.sh --data_path=DIR [--batch_size=32 --max_steps=100]
Network=ViT_for_PyTorch; CaseKind=perf
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
ExtraFlags="config"
config=configs/run_vit_base_p16_224_100ep.yaml batch_size=32 epochs=100 max_steps=100
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
on_restart=(--resume_training auto)
launch run_vit.py --config "$config" --run_mode train --train_dataset_dir "$data_path/train" --do_eval false \
  --batch_size "$batch_size" --epochs "$epochs" ${ckpt_path:+--load_checkpoint "$ckpt_path"}
