"""Every command of the README and of docs/ for this project, as typed, on small stand-ins."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from clip_sample import draw, write_coco_zips, write_shard

import convert_model
import run_clip
import save_clip_roberta
from ci.test import pages
from clip_pretraining.options import arguments, legacy
from common.distributed import World

PROJECT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # a line -> why it is not run here
    "pip install .*": "installing is `make install`",
    "python3 save_clip_roberta.py": "downloads two models; the next line does the same from folders",
    "python run_clip.py --train_shards 'https://.*": "test_shards.py reads tars from a server",
    "hf download .*": "downloads; `reader` has a small model as transformers saves it",
    "python convert_model.py .* --to onnx .*": "test_exchange.py runs it",
    "python convert_model.py --model_name_or_path weights.pt .*": "test_exchange.py reads such a file",
}
STAND_INS = {
    "/data/coco": "coco",
    "--vision_model DIR --text_model DIR": "--vision_model clip --text_model text --overwrite",
    "/disk1/a-{0000..0099}.tar::/disk2/b-*.tar": "disk1/a-{0000..0001}.tar::disk2/b-*.tar",
    "--ckpt_path=test/output/0": "--ckpt_path=output",
    "folder_of_open_clip": "for_open_clip",
}
# what is added to a line of run_clip.py: a tiny model and one step
ONE_STEP = "--do_train --max_steps 1 --per_device_train_batch_size 4".split()
QUICK = "--device cpu --dataloader_num_workers 0 --retrieval_picture False --per_device_eval_batch_size 4".split()


@pytest.fixture
def reader(tmp_path, tiny_model, tiny_clip, monkeypatch) -> Path:
    """The folder in which the README's lines are typed, with what they name."""
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    folder = pages.reader_folder(PROJECT, tmp_path)
    write_coco_zips(folder / "coco", {"train": 8, "val": 8})
    for name, model in {"clip-roberta": tiny_model, "clip": tiny_clip, "tiny_clip": tiny_clip}.items():
        (folder / name).symlink_to(model)
    shutil.copytree(tiny_model, folder / "output")
    tokenizer = RobertaTokenizerFast.from_pretrained(tiny_model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=130, **sizes))
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    pairs = [(f"{number}.jpg", draw(number)[1]) for number in range(8)]
    for number, (name, _) in enumerate(pairs):
        (folder / name).write_bytes(draw(number)[0])
        picture = folder / "imagenet" / "val" / f"n{number % 2}" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(draw(number)[0])
    (folder / "names.txt").write_text("n0 one\nn1 other\n")
    (folder / "captions.txt").write_text("\n".join(caption for _, caption in pairs))
    write_table(folder / "pairs.csv", [("image", "text"), *pairs], ",")
    for name in ("captions.csv", "captions_val.csv"):
        write_table(folder / name, [("image_path", "caption"), *pairs], ",")
    write_table(folder / "pairs.txt", [("image_path", "caption"), *pairs], "|")
    (folder / "val.jsonl").write_text("".join(json.dumps({"image": a, "text": b}) + "\n" for a, b in pairs))
    for name in ("disk1/a-0000", "disk1/a-0001", "disk2/b-7", "web/000", "web/001", "clean/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_shard(folder / f"{name}.tar", range(20))
    write_web_shard(folder / "web.tar")
    (folder / "list.txt").write_text("web.tar\n")
    monkeypatch.chdir(folder)
    return folder


def write_table(path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_web_shard(path: Path) -> None:
    """A tar with captions in KEY.json, of which one in a hundred is broken."""
    with tarfile.open(path, "w") as tar:
        for number in range(100):
            data, caption = draw(number % 30)
            text = json.dumps({"caption": caption}).encode() if number else b"{"
            for suffix, content in (("jpg", data), ("json", text)):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def run_python(script: str, words: list[str], reader: Path) -> None:
    """A script's main, in this process."""
    if script == "save_clip_roberta.py":
        save_clip_roberta.main(words)
    elif script == "convert_model.py":
        convert_model.main(words)
    else:
        output = ["--output_dir", str(reader / f"run {len(list(reader.glob('run *')))}")]
        evaluates = "--do_eval" in words and "--do_train" not in words
        model = [] if "--model_name_or_path" in words else ["--model_name_or_path", "clip-roberta"]
        more = QUICK if evaluates else [*ONE_STEP, *QUICK, *model, *output]
        assert run_clip.main([*words, *more])["Status"] == "OK"


def test_every_command_of_the_pages_runs(reader):
    for words in pages.lines_to_run(pages.of_project(PROJECT), ELSEWHERE, STAND_INS):
        if words[0] == "bash":
            for script, *options in pages.dry_run(words, reader):
                assert script == "run_clip.py"
                arguments.parse(legacy.translate(arguments.spelled_out(options))[0], World())
        else:
            assert words[0] in ("python", "python3"), words
            run_python(words[1], words[2:], reader)
    assert (reader / "start" / "model.safetensors").is_file()
    assert json.loads((reader / "eval" / "eval_results.json").read_text())["eval_zero_shot_images"] == 8
