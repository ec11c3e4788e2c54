#!/usr/bin/env bash
# Trains a small ViT from scratch on the sample pictures, then names a few pictures it has not seen.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo` and `make outcomes`.
# OUTPUT_DIR/demo.json holds the numbers that it ends with.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
pictures=$(realpath "$1")/images
output=$(realpath -m "${2:-$project/test/output/demo}")
cd "$project"
seed=${3:-0}

bash test/train_full_1p.sh --data_path="$pictures" --config=configs/run_vit_demo.yaml \
  --batch_size=64 --epochs=20 --output_dir="$output" -- --seed "$seed"

echo
echo "Five pictures the model has not seen:"
held_out=()
for class in animals_and_nature flags food_and_drink people_and_body travel_and_places; do
  held_out+=("$(find "$pictures/val/$class" -type f | LC_ALL=C sort | head -n 1)")
done
python3 run_vit.py --config configs/run_vit_demo.yaml --run_mode predict --load_checkpoint "$output/checkpoints/best.pt" \
  --predict_data "${held_out[@]}" --output_dir "$output"

largest=$(for class in "$pictures"/val/*/; do find "$class" -type f | wc -l; done | sort -n | tail -n 1)
all=$(find "$pictures/val" -type f | wc -l)
accuracy=$(sed -n 's/^TrainAccuracy = //p' "$output/ViT_for_PyTorch_bs64_1p_acc.log")
echo
python3 - "$accuracy" "$largest" "$all" "$output/demo.json" <<'PYTHON'
import json, sys
accuracy, largest, everything = map(float, sys.argv[1:4])
guess = 100 * largest / everything
print(f"top-1 on held-out pictures: {accuracy:.1f} %; always guessing the largest class: {guess:.1f} %")
json.dump({"top1": accuracy, "guessing": guess}, open(sys.argv[4], "w"))
sys.exit(0 if accuracy >= 2 * guess else "error: the model should be at least twice as good as guessing")
PYTHON
echo "loss plot: $output/loss.png"
