#!/usr/bin/env bash
# Evaluates a trained folder on one device, on COCO 2017's validation split or pairs of your own: in-batch loss, retrieval.
# Usage: bash test/train_eval_1p.sh --data_path=DIR --ckpt_path=FOLDER [--batch_size=64]
#    or: bash test/train_eval_1p.sh --validation_file=val.csv --ckpt_path=FOLDER
CaseKind=acc; RankSize=1
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/clip_options.sh"
UnusedFlags="epochs train_epochs resume source_weights"
Network=CLIP_for_PyTorch_eval # its result stands beside the training's
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
model_path=${ckpt_path:-$model_path}
require model_path
find_data
[[ -z $train_file$train_shards || -n $validation_share ]] || die "--train_file and --train_shards need --validation_share here"
[[ -n $evaluates ]] || die "--validation_file, --validation_shards or --validation_share is required: what to evaluate on"
launch run_clip.py --model_name_or_path "$model_path" "${data_options[@]}" --do_eval --per_device_eval_batch_size "$batch_size" --dataloader_num_workers "$workers" \
  --dataloader_drop_last
