"""The commands in README.md, and the reference's own recipes, are accepted as written."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import extract_features
import print_tokens
from beit2 import finetuning_options, pretraining_options, probe_options, tokenizer_options

README = Path(__file__).resolve().parents[1] / "README.md"
READERS = {
    "run_beitv2_pretraining.py": pretraining_options.read_options,
    "run_vqkd_training.py": tokenizer_options.read_options,
    "run_class_finetuning.py": finetuning_options.read_options,
    "run_linear_eval.py": probe_options.read_options,
    "extract_features.py": extract_features.read_options,
    "print_tokens.py": print_tokens.read_options,
}
# the options of the reference's recipes: PRETRAINING.md (large), VQ-KD and fine-tuning
RECIPES = {
    "run_beitv2_pretraining.py": "--data_set image_folder --data_path D --output_dir O --log_dir L "
    "--model beit_large_patch16_224_8k_vocab_cls_pt --shared_lm_head True --early_layers 21 --head_layers 2 "
    "--num_mask_patches 75 --second_input_size 224 "
    "--second_interpolation bicubic --min_crop_scale 0.2 --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip "
    "--tokenizer_weight W --batch_size 32 --lr 1.5e-3 --warmup_epochs 10 --clip_grad 3.0 --drop_path 0.1 "
    "--layer_scale_init_value 1e-5 --imagenet_default_mean_and_std --opt_betas 0.9 0.999 --opt_eps 1e-8 "
    "--epochs 1600 --save_ckpt_freq 20",
    "run_vqkd_training.py": "--data_set image_folder --data_path D --eval_data_path E --output_dir O --log_dir L "
    "--process_type default --train_interpolation bicubic --min_crop_scale 0.08 "
    "--model vqkd_encoder_base_decoder_1x768x12_clip --teacher_input_size 224 --codebook_n_emd 8192 "
    "--codebook_emd_dim 32 --quantize_kmeans_init --rec_loss_type cosine --batch_size 64 --opt adamw "
    "--opt_betas 0.9 0.99 --weight_decay 1e-4 --warmup_epochs 10 --epochs 100 --save_ckpt_freq 20",
    "run_class_finetuning.py": "--data_path D --eval_data_path E --nb_classes 1000 --data_set image_folder "
    "--output_dir O --input_size 224 --log_dir L --model beit_base_patch16_224 --weight_decay 0.05 --finetune W "
    "--batch_size 128 --lr 5e-4 --update_freq 1 --warmup_epochs 20 --epochs 100 --layer_decay 0.6 --drop_path 0.2 "
    "--mixup 0.8 --cutmix 1.0 --enable_deepspeed --imagenet_default_mean_and_std --dist_eval --save_ckpt_freq 20",
}


def readme_commands():
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", README.read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        script = next((word for word in words if word in READERS), None)
        if script is not None:
            yield script, words[words.index(script) + 1 :]


COMMANDS = [*readme_commands(), *((script, words.split()) for script, words in RECIPES.items())]


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=[f"{n}-{c[0]}" for n, c in enumerate(COMMANDS)])
def test_a_documented_command_is_accepted(script, words):
    options = READERS[script](words)
    if script == "run_beitv2_pretraining.py":
        with torch.device("meta"):
            pretraining_options.build_model(options)


def test_all_scripts_have_a_command():
    assert {script for script, _ in readme_commands()} == set(READERS)
