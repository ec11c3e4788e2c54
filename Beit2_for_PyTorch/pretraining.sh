#!/usr/bin/env bash
# BEiT v2 pretraining of the 5B model on eight cards, as the README calls it; also on COCO 2017.
# Usage: bash pretraining.sh [--data_path=DIR --tokenizer_weight=FILE --output_dir=DIR ...]
exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/test/train_5b_8p.sh" "$@"
