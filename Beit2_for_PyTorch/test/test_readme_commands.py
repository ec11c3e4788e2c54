"""Every command of the README and of docs/, run on small stand-ins; the reference's own recipes, read as typed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from small_models import OPTIONS

import beit2
import draw_predictions
import export_weights
import extract_features
import print_tokens
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
from beit2 import finetuning_options, pretraining_options, probe_options, tokenizer_options
from beit2.model import names
from beit2.model.teachers import build_teacher
from beit2.weights.files import read_checkpoint
from ci.test import pages

PROJECT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # a line -> why it is not run here
    "pip install .*": "installing is `make install`",
    "wget .*": "published weights; what is downloaded is tested in test_published_weights.py",
}
STAND_INS = {"/path/to/imagenet-1k/train": "DIR/train", "--output DIR": "--output exported", "--layer 9": "--layer 2"}
ON_CPU = "--device cpu --num_workers 0".split()
ONE_EPOCH = "--batch_size 4 --input_size 32 --epochs 1".split() + ON_CPU
# what is added to a line: a small model and an epoch of four steps; these options overrule what stands before them
NO_WARMUP = ["--warmup_epochs", "0"]
SMALL = {
    "run_beitv2_pretraining.py": [
        *OPTIONS,
        *"--model beit_test_cls_pt --shared_lm_head False".split(),
        *ONE_EPOCH,
        *NO_WARMUP,
    ],
    "run_vqkd_training.py": [
        *"--model vqkd_test_clip --codebook_n_emd 32 --codebook_emd_dim 8".split(),
        *ONE_EPOCH,
        *NO_WARMUP,
    ],
    "run_class_finetuning.py": ["--model", "beit_test_classifier", *ONE_EPOCH, *NO_WARMUP],
    "run_linear_eval.py": ["--model", "beit_test_classifier", *ONE_EPOCH],
}
MAINS = {
    script.__name__ + ".py": script.main
    for script in (
        *(run_beitv2_pretraining, run_vqkd_training, run_class_finetuning, run_linear_eval),
        *(draw_predictions, export_weights, extract_features, print_tokens),
    )
}
READERS = {
    "run_beitv2_pretraining.py": pretraining_options.read_options,
    "run_vqkd_training.py": tokenizer_options.read_options,
    "run_class_finetuning.py": finetuning_options.read_options,
    "run_linear_eval.py": probe_options.read_options,
}
# the page calls every script's file checkpoint.pth: which script's a line means
CHECKPOINT_OF = {"run_linear_eval.py": "run_linear_eval.py", "run_vqkd_training.py": "run_vqkd_training.py"}
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


@pytest.fixture
def reader(pictures, tokenizer_file, tmp_path, monkeypatch) -> Path:
    """The folder in which the README's lines are typed, with what they name."""
    folder = pages.reader_folder(PROJECT, tmp_path)
    (folder / "DIR").symlink_to(pictures)
    (folder / "FILE").symlink_to(tokenizer_file)
    torch.manual_seed(0)
    model = beit2.create_model("beit_test_cls_pt", img_size=32, vocab_size=32, early_layers=2, head_layers=1)
    for name in ("checkpoint-1599.pth", "beitv2_base_patch16_224_pt1k.pth"):
        torch.save({"model": model.state_dict()}, folder / name)
    shutil.copy(pictures / "val/red/0.jpg", folder / "picture.jpg")
    teacher = build_teacher({"width": 64, "layers": 1, "heads": 1, "output_dim": 12, "patch": 8, "res": 32})
    torch.save(teacher.state_dict(), folder / "CLIP")
    monkeypatch.chdir(folder)
    export_weights.main(["--checkpoint", "checkpoint-1599.pth", "--to", "timm", "--output", "DIR_OF_TIMM"])
    return folder


def accepted(script: str, words: list[str]) -> None:
    """The options are read, and a pretraining model of these sizes can be built."""
    options = READERS[script](words)
    if script == "run_beitv2_pretraining.py":
        with torch.device("meta"):
            pretraining_options.build_model(options)


def run_python(script: str, arguments: list[str], reader: Path) -> None:
    """A script's main, in this process; the checkpoints that later lines name come from the lines before."""
    output = reader / "runs" / script
    output = output.with_name(f"{script} 2") if output.exists() else output
    if script in READERS:
        accepted(script, arguments)  # as typed: what is added below must not hide a mistake
    if "--plan_memory" in arguments:
        return MAINS[script](arguments)
    if "checkpoint.pth" in arguments:
        made_by = CHECKPOINT_OF.get(script, "run_beitv2_pretraining.py")
        shutil.copy(reader / "runs" / made_by / "checkpoint.pth", reader)
    if "--eval" in arguments:
        arguments = [*arguments, *ON_CPU, "--output_dir", str(reader / "evaluated" / script)]
    elif script in SMALL:
        arguments = [*arguments, *SMALL[script], "--output_dir", str(output)]
    elif script == "extract_features.py":
        arguments = [*arguments, *ON_CPU]
    elif script == "export_weights.py":
        shutil.rmtree("exported", ignore_errors=True)
    MAINS[script](arguments)
    if script == "run_class_finetuning.py" and "--eval" not in arguments:
        shutil.copy(output / "checkpoint-best.pth", reader)


@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_every_command_of_the_pages_runs(reader, capsys):
    for words in pages.lines_to_run(pages.of_project(PROJECT), ELSEWHERE, STAND_INS):
        if words[0] == "bash":
            for script, *arguments in pages.dry_run(words, reader):
                accepted(script, arguments)
        else:
            at = next(index for index, word in enumerate(words) if word.endswith(".py"))
            assert words[:at] in (["python"], ["torchrun", words[1]]), words
            run_python(words[at], words[at + 1 :], reader)
    planned = pages.blocks(PROJECT / "README.md", "")
    (block,) = (text for text in planned if "--plan_memory" in text)
    assert block.split("\n", 1)[1] in capsys.readouterr().out, "the README shows what is printed"
    assert list((reader / "exported").iterdir())


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_of_the_reference_is_read_as_typed(script):
    accepted(script, RECIPES[script].split())


def base_recipe() -> list[str]:
    lines = map(shlex.split, pages.of_project(PROJECT))
    line = next(words for words in lines if "run_beitv2_pretraining.py" in words and "--epochs" in words)
    return line[line.index("run_beitv2_pretraining.py") + 1 :]


@pytest.mark.parametrize(("size", "depth"), [("base", 12), ("large", 24)])
def test_the_published_recipes_run_under_the_published_names(pictures, tmp_path, monkeypatch, size, depth):
    """Narrow stand-ins for the networks, with their true depth, pictures, patches and codes; the tokenizer is found."""
    words = base_recipe() if size == "base" else RECIPES["run_beitv2_pretraining.py"].split()
    name, tokenizer = f"beit_{size}_patch16_224_8k_vocab_cls_pt", words[words.index("--tokenizer_model") + 1]
    at = words.index("--tokenizer_weight")
    del words[at : at + 2]
    narrow = {"embed_dim": 32, "num_heads": 2, "depth": depth, "cls_pt": True, "early_layers": 9}
    monkeypatch.setitem(names.PRETRAINING_MODELS, name, narrow)
    monkeypatch.setitem(names.TOKENIZERS, tokenizer, {"dim": 32, "depth": 1, "heads": 2, "decoder_depth": 1})
    monkeypatch.chdir(tmp_path)
    Path("tokenizer_model").mkdir()
    torch.manual_seed(0)
    torch.save({"model": beit2.create_tokenizer(tokenizer).state_dict()}, f"tokenizer_model/{tokenizer}.pth")
    where = ["--data_path", str(pictures / "train"), "--output_dir", "out", "--log_dir", "events", "--device", "cpu"]
    result = run_beitv2_pretraining.main(
        [*words, *where, "--num_workers", "0", "--batch_size", "4", "--max_steps", "2", "--log_every", "1"]
    )
    assert result["Status"] == "OK" and result["ActualLoss"] == pytest.approx(2 * 9.01, abs=0.3)  # two heads, ln 8192
    model = read_checkpoint(Path("out/checkpoint.pth"))["model"]
    assert f"blocks.{depth - 1}.norm1.weight" in model and model["lm_head.weight"].shape == (8192, 32)
    assert list(Path("events").glob("events.*"))


def test_all_scripts_have_a_command():
    text = " ".join(pages.commands(PROJECT / "README.md"))
    assert set(re.findall(r"\b\w+\.py\b", text)) == {path.name for path in PROJECT.glob("*.py")}
