"""Zero-shot classification, the vision tower for others, building and loading model folders, options."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from clip_sample import draw
from safetensors.torch import load_file

import run_clip
import save_clip_roberta
from clip_pretraining import contrastive_loss, siglip_loss
from clip_pretraining.data.images import load_image
from clip_pretraining.data.pairs import DecodedImages, ImageRef
from clip_pretraining.data.tokenization import PackedCaptions, load_tokenizer
from clip_pretraining.evaluation import zeroshot
from clip_pretraining.evaluation.encoder import Encoder, in_batch_loss, normalise_pixels
from clip_pretraining.model.loading import ImageSettings, encode_images, image_settings, load_model
from clip_pretraining.options import legacy
from common.distributed import World
from common.errors import UsageError


def encoder_of(folder: Path, batch_size: int = 4) -> Encoder:
    model = load_model(str(folder)).eval()
    return Encoder(model, image_settings(str(folder), model.config), 1, 64, World(), batch_size=batch_size)


@pytest.fixture
def class_folders(tmp_path) -> Path:
    for i in range(12):
        folder = tmp_path / "classes" / f"class_{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(draw(i)[0])
    return tmp_path / "classes"


def test_zero_shot_accuracy_by_hand(class_folders, tiny_model):
    encoder, tokenizer = encoder_of(tiny_model), load_tokenizer(str(tiny_model))
    got = zeroshot.evaluate(encoder, tokenizer, zeroshot.read_task(class_folders))
    templates = zeroshot.read_templates(zeroshot.IMAGENET_TEMPLATES)
    weights = []
    for name in ("class 0", "class 1", "class 2"):  # one by one, as section 3.1.4 describes it
        texts = [encoder.texts(PackedCaptions.tokenise([t.replace("{}", name)], tokenizer, 64))[0] for t in templates]
        weights.append(torch.nn.functional.normalize(torch.stack(texts).mean(0), dim=0))
    hits = 0
    for i in range(12):
        pixels = load_image(class_folders / f"class_{i % 3}/{i}.jpg", 32)[None]
        mean, std = (torch.tensor(v) for v in (encoder.settings.mean, encoder.settings.std))
        feature = encode_images(encoder.model, normalise_pixels(pixels, mean, std))[0]
        hits += int(torch.stack(weights).mv(feature).argmax() == i % 3)
    assert got["zero_shot_top1"] == hits / 12 and got["zero_shot_top5"] == 1.0
    assert (got["zero_shot_images"], got["zero_shot_classes"]) == (12, 3)


def test_openai_published_eighty_templates():
    templates = zeroshot.read_templates(zeroshot.IMAGENET_TEMPLATES)
    assert len(templates) == len(set(templates)) == 80
    assert "itap of my {}." in templates and "a photo of the hard to see {}." in templates


def test_zero_shot_files_are_checked(class_folders, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="2 names for 3 class folders"):
        zeroshot.read_class_names(tmp_path / "names.txt", ["a", "b", "c"])
    with pytest.raises(UsageError, match="every line needs"):
        zeroshot.read_templates(tmp_path / "names.txt")
    with pytest.raises(UsageError, match="at least two class folders"):
        zeroshot.list_folder(class_folders / "class_0")


def test_what_is_wrong_with_the_zero_shot_folder_shows_before_training(
    class_folders, pairs_table, tiny_model, tmp_path, capsys
):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    table = ["--train_file", str(pairs_table), "--validation_file", str(pairs_table), "--max_steps", "1"]
    command = ["--do_train", "--do_eval", *table, "--device", "cpu", "--zero_shot_dir", str(class_folders)]
    command += ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        run_clip.main([*command, "--class_names", str(tmp_path / "names.txt")])
    assert "2 names for 3 class folders" in capsys.readouterr().err
    (class_folders / "class_1/1.jpg").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        run_clip.main(command)
    assert "zero_shot: 1 of 12 samples left out: 1 x picture cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_are_cleaned_as_captions_are(class_folders):
    """The check of the pictures, which may lie in `.clip_cache` beside the classes, is no class."""
    (class_folders / ".clip_cache").mkdir()
    task = zeroshot.read_task(class_folders, clean=True)
    assert len(task.prompts) == 3 and task.labels == sorted([0, 1, 2] * 4)
    assert "a bad photo of a class 1." in task.prompts[1] and all(p == p.lower() for row in task.prompts for p in row)


def test_features_do_not_depend_on_the_batch(pairs_table, tiny_model):
    images = DecodedImages([ImageRef(str(pairs_table.parent / f"{i}.jpg")) for i in range(7)], 32)
    tokens = PackedCaptions.tokenise([draw(i)[1] * (1 + i % 3) for i in range(7)], load_tokenizer(str(tiny_model)), 64)
    one, many = encoder_of(tiny_model, 1), encoder_of(tiny_model, 7)
    torch.testing.assert_close(one.images(images), many.images(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.texts(tokens), many.texts(tokens), atol=1e-6, rtol=0)


def test_the_in_batch_loss_weighs_batches_by_their_size(tiny_model):
    features = torch.nn.functional.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    model = load_model(str(tiny_model))
    part = [in_batch_loss(features[a:b], features[a:b].flip(0), model, 9, False) for a, b in ((0, 4), (4, 8))]
    text = torch.cat([features[0:4].flip(0), features[4:8].flip(0), features[8:].flip(0)])
    last = in_batch_loss(features[8:], features[8:].flip(0), model, 9, False)
    whole = in_batch_loss(features, text, model, 4, drop_last=False)
    assert whole == pytest.approx((4 * part[0] + 4 * part[1] + 2 * last) / 10)
    dropped = in_batch_loss(features, text, model, 4, drop_last=True)
    assert dropped == pytest.approx((part[0] + part[1]) / 2)


def test_open_clip_s_own_losses_agree():
    pytest.importorskip("open_clip", reason="the library itself: pip install -r requirements-dev.txt")
    from open_clip.loss import ClipLoss, SigLipLoss

    draw = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(40, 16, generator=draw), dim=1) for _ in range(2))
    scale, bias = torch.tensor(3.0), torch.tensor(-4.0)
    assert contrastive_loss(image, text, scale).item() == pytest.approx(ClipLoss()(image, text, scale.exp()).item())
    theirs = SigLipLoss()(image, text, scale.exp(), bias)
    assert siglip_loss(image, text, scale, bias).item() == pytest.approx(theirs.item())


def as_transformers_4(new: Path, old: Path) -> None:
    """The eight files that transformers 4.18 wrote, from a folder of transformers 5."""
    from transformers import RobertaTokenizer

    old.mkdir()
    weights = {}
    for key, value in load_file(new / "model.safetensors").items():
        nested = key.startswith("vision_model.")
        weights[key.replace("vision_model.", "vision_model.vision_model.", 1) if nested else key] = value
    weights["text_model.embeddings.position_ids"] = torch.arange(66)[None]
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(weights, old / "pytorch_model.bin")
    shutil.copy(new / "config.json", old)
    shutil.copy(new / "tokenizer.json", old)
    model = json.loads((new / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": RobertaTokenizer.__name__}))
    (old / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    values = {"crop_size": 32, "size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (old / "preprocessor_config.json").write_text(
        json.dumps({**values, "feature_extractor_type": "CLIPFeatureExtractor"})
    )


def test_a_folder_of_transformers_4_is_the_same_model(tiny_model, tmp_path):
    as_transformers_4(tiny_model, tmp_path / "old")
    assert len(list((tmp_path / "old").iterdir())) == 8
    new, old = load_model(str(tiny_model)), load_model(str(tmp_path / "old"))
    assert all(torch.equal(old.state_dict()[key], value) for key, value in new.state_dict().items())
    text = "a red box on green ground"
    tokens = [load_tokenizer(str(folder))(text)["input_ids"] for folder in (tiny_model, tmp_path / "old")]
    assert tokens[0] == tokens[1]
    assert image_settings(str(tmp_path / "old"), old.config) == ImageSettings(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def test_two_local_folders_are_joined_with_seeded_projections(tiny_model, tiny_clip, tmp_path):
    dual = load_model(str(tiny_model))
    dual.text_model.save_pretrained(tmp_path / "text")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "text")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command = ["--vision_model", str(tiny_clip), "--text_model", str(tmp_path / "text"), "--seed", seed]
        save_clip_roberta.main([*command, "--output_dir", str(tmp_path / name)])
    a, b, c = (load_model(str(tmp_path / name)).state_dict() for name in "abc")
    assert torch.equal(a["text_projection.weight"], b["text_projection.weight"])
    assert not torch.equal(a["text_projection.weight"], c["text_projection.weight"])
    assert torch.equal(
        a["vision_model.embeddings.class_embedding"],
        load_model(str(tiny_clip)).state_dict()["vision_model.embeddings.class_embedding"],
    )


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--do_train"], "give --data_dir (COCO), --train_file or --train_shards"),
        ([], "nothing to do"),
        (["--do_train", "--data_dir", "/nowhere"], "--data_dir /nowhere: no such folder"),
        (["--do_eval", "--data_dir", ".", "--dataset_name", "imagenet"], "only ydshieh/coco_dataset_script"),
        (["--do_train", "--train_file", "none.csv"], "none.csv: no such file"),
        (["--do_train", "--data_dir", ".", "--bacth_size", "3"], "--bacth_size"),
        (["--do_train", "--data_dir", ".", "--fp16_opt_level", "O9"], "O0, O1, O2 or O3"),
        (["--do_train", "--data_dir", ".", "--device", "cuda"], "--device cuda"),
        (["--do_predict", "--do_eval", "--data_dir", "."], "--do_predict"),
        (["--do_train", "--data_dir", ".", "--precision", "fp8"], "fp32, bf16, fp16"),
        (["--do_train", "--data_dir", ".", "--local_rank"], "--local_rank : give the number of a card"),
        (["--do_train", "--data_dir", ".", "--gradient_accumulation_steps", "0"], "must be at least 1"),
        (["--do_train", "--data_dir", ".", "--num_workers", "-1"], "--dataloader_num_workers -1: must be at least 0"),
        (["--do_train", "--data_dir", ".", "--output_dir", __file__], "a file; name a folder"),
        (["--do_eval", "--data_dir", ".", "--max_eval_samples", "0"], "--max_eval_samples 0: must be at least 1"),
        (["--do_train", "--data_dir", ".", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor: the targets"),
        (["--do_train", "--data_dir", ".", "--auto_find_batch_size"], "raise --gradient_accumulation_steps"),
        (["--do_train", "--data_dir", ".", "--zero_shot_dir", "."], "add --do_eval"),
        (["--do_eval", "--data_dir", ".", "--templates", __file__], "give that too"),
    ],
)
def test_wrong_options_end_in_one_sentence(options, reason, tiny_model, tmp_path, capsys):
    device = [] if "--device" in options else ["--device", "cpu"]
    command = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tiny_model), *device, *options]
    with pytest.raises(SystemExit) as error:
        run_clip.main(command)
    assert error.value.code == 2 and reason in capsys.readouterr().err


def test_a_wrong_model_folder_is_explained(tiny_model, pairs_table, tmp_path):
    with pytest.raises(UsageError, match="not a model folder"):
        load_model(str(tmp_path))
    roberta = tmp_path / "roberta"
    load_model(str(tiny_model)).text_model.save_pretrained(roberta)
    with pytest.raises(UsageError, match="a 'roberta' model"):
        load_model(str(roberta))
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_model, mixed)
    shutil.copy(roberta / "model.safetensors", mixed)
    with pytest.raises(UsageError, match="the weights lack"):
        load_model(str(mixed))
    config = json.loads((tiny_model / "config.json").read_text())
    config["projection_dim"] = 32
    (mixed / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny_model / "model.safetensors", mixed)
    with pytest.raises(
        UsageError, match=r"text_projection.weight is \[64, 64\] in the weights and \[32, 64\] by config"
    ):
        load_model(str(mixed))
    for text in ("{", "[]"):
        (mixed / "processor_config.json").write_text(text)
        with pytest.raises(UsageError, match="mixed/processor_config.json: not"):
            image_settings(str(mixed), load_model(str(tiny_model)).config)
    (mixed / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(mixed))


def test_old_options_in_todays_words():
    words, notes = legacy.translate(
        "--evaluation_strategy=epoch --no_cuda --warmup_ratio 0.1 --half_precision_backend apex --num_workers 3 "
        "--loss_scale dynamic --optim adamw_torch --save_every 5 --fp16_opt_level O0".split()
    )
    assert words == (
        "--eval_strategy epoch --device_name cpu --warmup_steps 0.1 --dataloader_num_workers 3 --optim adamw_torch "
        "--save_strategy steps --save_steps 5 --precision fp32".split()
    )
    assert [note.split()[0] for note in notes] == [
        "--evaluation_strategy",
        "--no_cuda",
        "--warmup_ratio",
        "--half_precision_backend",
        "--fp16_opt_level",
    ]
