#!/usr/bin/env bash
# Trains a small dual encoder from nothing on captioned emoji, then retrieves emoji whose combination of words it has never
# seen (all words seen, this figure in this skin tone never), and emoji of concepts that are new to it.
# Promises: text_to_image_R@1 >= 85, text_to_image_R@10 >= 96 within 480 CPU seconds
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo PROJECT=CLIP_for_PyTorch` and
# `make outcomes`. OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent.
# CAPTIONS=zh trains and asks in Chinese.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
(($#)) || { echo "error: which sample data? bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]]" >&2; exit 2; }
source "$project/../common/whole_group.sh"
data=$(realpath "$1")/captioned_emoji${CAPTIONS:+/$CAPTIONS}
output=$(realpath -m "${2:-$project/test/output/demo}")
seed=${3:-0}
epochs=9
case ${CAPTIONS:-} in
  "") ;;
  zh) epochs=45 ;; # one caption a picture there, five here: as many steps
  *) echo "error: CAPTIONS=$CAPTIONS: give zh, or leave it out for English" >&2; exit 2 ;;
esac
cd "$project"
[[ -f $data/train.jsonl ]] || { echo "error: $data/train.jsonl: no such file; make sample_data builds it" >&2; exit 2; }

python3 save_clip_roberta.py --from_scratch mini --family clip --captions "$data/train.jsonl" \
  --output_dir "$output/start" --overwrite --seed "$seed"
bash test/train_full_1p.sh --data_path="$data" --model_path="$output/start" --batch_size=128 --epochs=$epochs \
  --precision=fp32 --workers=0 --output_dir="$output" -- --train_file "$data/train.jsonl" \
  --validation_file "$data/unseen_combination.jsonl" --seed "$seed" --learning_rate 1e-3 --weight_decay 0.2 \
  --warmup_steps 60 --lr_scheduler_type cosine --distinct_pairs --crop_cache "$output/crops" --log_every 50 --save_every 0
echo
echo "Emoji of families that training never showed:"
python3 run_clip.py --do_eval --model_name_or_path "$output" --validation_file "$data/unseen_concept.jsonl" \
  --output_dir "$output/unseen_concept" --per_device_eval_batch_size 128 --dataloader_drop_last
times >"$output/times.txt"
echo
echo "The control, which is no part of the promise: the same network before any training:"
python3 run_clip.py --do_eval --model_name_or_path "$output/start" --validation_file "$data/unseen_combination.jsonl" \
  --output_dir "$output/untrained" --per_device_eval_batch_size 128 --dataloader_drop_last --precision fp32
echo
PYTHONPATH="$project/..${PYTHONPATH:+:$PYTHONPATH}" python3 test/demo_report.py "$data" "$output"
