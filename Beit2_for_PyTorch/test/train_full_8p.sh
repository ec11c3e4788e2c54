#!/usr/bin/env bash
# Pretrains BEiT v2 (base, with the CLS head) on eight devices, by the published recipe.
# Usage: bash test/train_full_8p.sh --data_path=DIR [--tokenizer_weight=FILE --batch_size=N --epochs=N ...]
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_full_1p.sh" "$@"
