#!/usr/bin/env bash
# Trains a small dual encoder from nothing on captioned emoji, then retrieves emoji it has never seen.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR ; called by `make demo PROJECT=CLIP_for_PyTorch`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
coco=$(realpath "$1")/coco2017
output=$PWD/test/output/demo

python3 save_clip_roberta.py --tiny --image_size 48 --captions "$coco/annotations/captions_train2017.json" \
  --output_dir "$output/clip-roberta" --overwrite
bash test/train_full_1p.sh --data_path="$coco" --model_path="$output/clip-roberta" --batch_size=128 --epochs=4 \
  --precision=fp32 --workers=1 --output_dir="$output" -- --learning_rate 2e-3 --warmup_steps 40 \
  --lr_scheduler_type cosine --eval_strategy no --crop_cache "$output/crops" --log_every 50

echo
python3 - "$output/eval_results.json" <<'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
pictures, captions = found["eval_images"], found["eval_samples"]
print(f"Retrieval on {pictures} held-out emoji with {captions} captions, against guessing:")
better = True
for direction, chance in (("image_to_text", lambda k: k * (captions / pictures) / captions), ("text_to_image", lambda k: k / pictures)):
    for k in (1, 5, 10):
        value = found[f"eval_{direction}_R@{k}"]
        better = better and value > 3 * chance(k)
        print(f"  {direction} R@{k:<2} {100 * value:6.2f} %   guessing {100 * chance(k):5.2f} %")
sys.exit(0 if better else "error: the model should be at least three times as good as guessing")
PYTHON
echo "queries and their best five answers: $output/retrieval.png; loss plot: $output/loss.png"
