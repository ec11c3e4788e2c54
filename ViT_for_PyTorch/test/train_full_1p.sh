#!/usr/bin/env bash
# Fine-tunes ViT-B/16 with MAE's recipe on 1 device: DIR holds train/<class>/* and val/<class>/*.
# An interrupted run goes on with --resume=auto. Without --ckpt_path training starts from scratch.
# Usage: bash test/train_full_1p.sh --data_path=DIR --ckpt_path=mae_pretrain_vit_base.pth [--batch_size=32 --epochs=100 --resume=auto]
Network=ViT_for_PyTorch; CaseKind=acc
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
ExtraFlags="config resume"
config=configs/run_vit_base_p16_224_100ep.yaml batch_size=32 epochs=100
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
on_restart=(--resume_training auto)
start_mode=train
[[ -z $ckpt_path ]] || start_mode=finetune
launch run_vit.py --config "$config" --run_mode "$start_mode" \
  --train_dataset_dir "$data_path/train" --eval_dataset_dir "$data_path/val" \
  --batch_size "$batch_size" --epochs "$epochs" ${ckpt_path:+--load_checkpoint "$ckpt_path"} \
  ${resume:+--resume_training "$resume"}
