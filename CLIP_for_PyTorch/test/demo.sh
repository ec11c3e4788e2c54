#!/usr/bin/env bash
# Trains a small dual encoder from nothing on captioned emoji, then retrieves emoji it has never seen.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo PROJECT=CLIP_for_PyTorch` and
# `make outcomes`. OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
coco=$(realpath "$1")/coco2017
output=$(realpath -m "${2:-$project/test/output/demo}")
seed=${3:-42}
cd "$project"

python3 save_clip_roberta.py --tiny --image_size 48 --captions "$coco/annotations/captions_train2017.json" \
  --output_dir "$output/clip-roberta" --overwrite --seed "$seed"
bash test/train_full_1p.sh --data_path="$coco" --model_path="$output/clip-roberta" --batch_size=128 --epochs=3 \
  --precision=fp32 --workers=1 --output_dir="$output" -- --seed "$seed" --learning_rate 1e-3 --weight_decay 0.2 --warmup_steps 40 \
  --lr_scheduler_type cosine --eval_strategy no --crop_cache "$output/crops" --log_every 50

echo
python3 - "$output/eval_results.json" "$output/demo.json" <<'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
pictures, captions = found["eval_images"], found["eval_samples"]
print(f"Retrieval on {pictures} held-out emoji with {captions} captions, against guessing:")
print("               text to image           image to text")
for k in (1, 5, 10):
    text, image = (100 * found[f"eval_{way}_R@{k}"] for way in ("text_to_image", "image_to_text"))
    # the best of a picture's five captions comes first as often by chance as one of 367 pictures does
    print(f"  R@{k:<3} {text:6.2f} % ({100 * k / pictures:.2f} %)     {image:6.2f} % ({100 * k / pictures:.2f} %)")
numbers = {f"{way}_R@{k}": 100 * found[f"eval_{way}_R@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
json.dump(numbers, open(sys.argv[2], "w"))
# of three seeds the mean is 2.8 times guessing, the deviation 0.3; R@5 varies by a third from seed to seed
better = found["eval_text_to_image_R@10"] > 1.75 * 10 / pictures
sys.exit(0 if better else "error: text to image should be at least 1.75 times as good as guessing at R@10")
PYTHON
echo "queries and their best five answers: $output/retrieval.png; loss plot: $output/loss.png"
