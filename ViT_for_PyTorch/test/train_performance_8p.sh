#!/usr/bin/env bash
# Speed of ViT-B/16 training on 8 devices: a short run, no evaluation.
# Usage: bash test/train_performance_8p.sh --data_path=DIR [--batch_size=32 --max_steps=100]
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_performance_1p.sh" "$@"
