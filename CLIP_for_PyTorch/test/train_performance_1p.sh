#!/usr/bin/env bash
# Measures the speed of CLIP training on COCO 2017 on one device: 1000 steps, nothing saved on the way.
# Usage: bash test/train_performance_1p.sh --data_path=DIR --model_path=FOLDER [--batch_size=64 --max_steps=1000]
CaseKind=perf
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/clip_options.sh"
max_steps=1000
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
train_clip --save_every 0
