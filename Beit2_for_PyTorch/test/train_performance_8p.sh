#!/usr/bin/env bash
# Measures the speed of BEiT v2 pretraining on eight devices; saves nothing.
# Usage: bash test/train_performance_8p.sh --data_path=DIR [--max_steps=N --batch_size=N ...]
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_performance_1p.sh" "$@"
