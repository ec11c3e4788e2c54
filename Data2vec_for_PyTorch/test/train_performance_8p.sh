#!/usr/bin/env bash
# Speed of data2vec text pretraining on 8 devices: no validation, no checkpoints.
# Usage: bash test/train_performance_8p.sh --data_path=DIR [--config_name=base --max_update=5000]; DIR holds dict.txt, train.bin, ...
RankSize=8
config_name=base
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_performance_1p.sh" "$@"
