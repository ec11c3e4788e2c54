#!/usr/bin/env bash
# Fine-tunes ViT-B/16 with MAE's recipe on 8 devices: DIR holds train/<class>/* and val/<class>/*.
# An interrupted run goes on with --resume=auto. Without --ckpt_path training starts from scratch.
# Usage: bash test/train_full_8p.sh --data_path=DIR --ckpt_path=mae_pretrain_vit_base.pth [--batch_size=32 --epochs=100 --resume=auto]
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_full_1p.sh" "$@"
