#!/usr/bin/env bash
# Trains a small ViT from scratch on emoji, whole families of emoji held out, asks it about the held-out ones as the same and
# as another artist draws them, and holds its accuracy against what needs no learning. The config's head says what it
# promises, demo.json whether it was kept.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo` and `make outcomes`.
# OUTPUT_DIR/demo.json holds the numbers that it ends with.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
(($#)) || { echo "error: which sample data? bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]]" >&2; exit 2; }
source "$project/../common/whole_group.sh"
pictures=$(realpath "$1")/images
other_artist=$(realpath "$1")/images_openmoji
output=$(realpath -m "${2:-$project/test/output/demo}")
cd "$project"
seed=${3:-0}
for folder in "$pictures/val" "$other_artist/val"; do # said now, not after minutes of training
  [[ -d $folder ]] || { echo "error: $folder: no such folder; \`make sample_data\` builds it" >&2; exit 2; }
done

bash test/train_full_1p.sh --data_path="$pictures" --config=configs/run_vit_demo.yaml \
  --batch_size=64 --epochs=80 --output_dir="$output" -- --seed "$seed" --save_every 100000

echo
echo "Pictures the model has not seen, of every class the four that stand evenly in its sorted list:"
held_out=()
for class in "$pictures"/val/*/; do
  mapfile -t files < <(find "$class" -type f -o -type l | LC_ALL=C sort)
  for i in 1 3 5 7; do held_out+=("${files[i * ${#files[@]} / 8]}"); done
done
last=$(find "$output/checkpoints" -name 'checkpoint-*.pt' | sort -V | tail -n 1)
python3 run_vit.py --config configs/run_vit_demo.yaml --run_mode predict --load_checkpoint "$last" \
  --predict_data "${held_out[@]}" --output_dir "$output"

echo
echo "The same emoji as another artist draws them:"
python3 run_vit.py --config configs/run_vit_demo.yaml --run_mode eval --load_checkpoint "$last" \
  --eval_dataset_dir "$other_artist/val" --output_dir "$output/other_artist"

times >"$output/times.txt"
echo
echo "The control, which is no part of the promise: the same network before any training, nearest neighbours by its features:"
python3 -c "
import sys, torch
from vit import AutoConfig, AutoModel
torch.manual_seed(int(sys.argv[1]))
AutoModel.from_config(AutoConfig.from_pretrained('vit_demo_conv', num_classes=9)).save_pretrained(sys.argv[2])
" "$seed" "$output/untrained/weights"
python3 run_vit.py --config configs/run_vit_demo.yaml --run_mode knn --load_checkpoint "$output/untrained/weights" \
  --train_dataset_dir "$pictures/train" --eval_dataset_dir "$pictures/val" --output_dir "$output/untrained"
echo
PYTHONPATH="$project/..${PYTHONPATH:+:$PYTHONPATH}" python3 test/demo_report.py "$pictures" "$other_artist" "$output"
