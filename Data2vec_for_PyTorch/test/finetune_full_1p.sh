#!/usr/bin/env bash
# Fine-tunes a pretrained data2vec text model on sentences of a table: classification or regression. Goes on where it stopped.
# Usage: bash test/finetune_full_1p.sh --data_path=DIR --pretrained_path=FILE --corpus_path=DIR [--config_name=base --epochs=10]
#   DIR of the data holds train.csv and valid.csv (.tsv, .jsonl); DIR of the corpus dict.txt, and encoder.json and vocab.bpe
#   (or these two in --bpe_path=DIR).
# Columns and the like after a lone --: task.columns=[sentence1,sentence2] task.regression_target=true
Network=Data2vec_for_PyTorch_finetune; CaseKind=acc; RankSize=1
ExtraFlags="config_dir config_name pretrained_path corpus_path bpe_path"
config_dir=configs/text/finetuning; config_name=${config_name:-base}
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path pretrained_path corpus_path
bpe_path=${bpe_path:-$corpus_path}
on_restart=(--resume auto)
launch finetune.py --config-dir "$config_dir" --config-name "$config_name" "task.data=$data_path" \
  "checkpoint.finetune_from_model=$pretrained_path" "task.encoder_json=$bpe_path/encoder.json" \
  "task.vocab_bpe=$bpe_path/vocab.bpe" "task.dict=$corpus_path/dict.txt" \
  "distributed_training.distributed_world_size=$world_size" ${batch_size:+"dataset.batch_size=$batch_size"} \
  ${epochs:+"optimization.max_epoch=$epochs"} ${ckpt_path:+--resume "$ckpt_path"}
