#!/usr/bin/env bash
# Measures the speed of CLIP training on COCO 2017 on 8 devices: 1000 steps, nothing saved on the way.
# Usage: bash test/train_performance_8p.sh --data_path=DIR --model_path=FOLDER [--batch_size=64 --max_steps=1000]
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_performance_1p.sh" "$@"
