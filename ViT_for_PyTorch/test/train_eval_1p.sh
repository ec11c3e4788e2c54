#!/usr/bin/env bash
# Scores a fine-tuned checkpoint on DIR/val: every picture once, top-1, top-5 and loss with their counts.
# Usage: bash test/train_eval_1p.sh --data_path=DIR --ckpt_path=FILE [--batch_size=32]
Network=ViT_for_PyTorch_eval; CaseKind=acc; RankSize=1
ExtraFlags="config"; UnusedFlags="epochs"
config=configs/run_vit_base_p16_224_100ep.yaml batch_size=32
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path ckpt_path
launch run_vit.py --config "$config" --run_mode eval --eval_dataset_dir "$data_path/val" \
  --batch_size "$batch_size" --load_checkpoint "$ckpt_path"
