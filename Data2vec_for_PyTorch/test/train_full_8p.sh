#!/usr/bin/env bash
# Pretrains data2vec text on 8 devices with the paper's configuration (512 tokens a sample). Goes on where it stopped.
# Usage: bash test/train_full_8p.sh --data_path=DIR [--config_name=base --max_update=1000000 --ckpt_path=FILE]; DIR holds dict.txt, train.bin, ...
# Pictures: --config_dir=configs/vision/pretraining --config_name=base_imagenet; DIR holds them, or train/ with them.
RankSize=8
config_name=base
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_full_1p.sh" "$@"
