"""The options of run_clip.py: the reference's, those of `transformers` 5, and the repo's own spellings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from common.device import PRECISIONS
from common.distributed import World
from common.errors import UsageError


@dataclass
class ModelArguments:
    """Which model, tokenizer and image processor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model folder or hub name (clip-roberta)."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration folder: train from scratch (without --model_name_or_path)."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, when not in the model folder."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor, likewise."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Hub downloads, unpacked COCO zips, lists of remote tars, the check of pictures."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    token: str | None = field(default=None, metadata={"help": "Access token for private hub models."})
    freeze_vision_model: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_text_model: bool = field(default=False, metadata={"help": "Do not train the text tower."})

    def hub(self) -> dict[str, str | None]:
        """Keyword arguments of every `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass
class DataArguments:
    """Which pairs: COCO (--data_dir), a table (--train_file) or tars (--train_shards)."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "ydshieh/coco_dataset_script, read from --data_dir; no script is run."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "COCO's year; 2017."})
    data_dir: str | None = field(default=None, metadata={"help": "COCO folder, or where a table's pictures lie."})
    image_column: str = field(default="image_path", metadata={"help": "Column of a table with the picture's file."})
    caption_column: str = field(default="caption", metadata={"help": "Column of a table with the caption."})
    train_file: str | None = field(default=None, metadata={"help": ".csv, .tsv, .json or .jsonl of pairs."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})
    train_shards: str | None = field(
        default=None, metadata={"help": "WebDataset tars, files or http(s) URLs: a-{0000..0100}.tar::b.tar"}
    )
    validation_shards: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})
    max_seq_length: int = field(default=128, metadata={"help": "Longest caption in tokens; more is cut off."})
    clean_captions: bool = field(
        default=False, metadata={"help": "OpenAI's cleaning before tokenising: broken Unicode, HTML entities, case."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N validation pairs."})
    check_images: bool = field(default=True, metadata={"help": "Decode every picture once before training."})
    crop_cache: str | None = field(
        default=None, metadata={"help": "Folder for decoded crops (150 KB a picture at 224): decode only once."}
    )


@dataclass
class ClipTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the loss, the evaluation and the repo's options."""

    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log (--log_every)."})
    report_to: str | None = field(default="none", metadata={"help": "Further trackers; TensorBoard is always written."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Our log has a progress bar of its own."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Unused: a non-finite loss stops the run."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter goes unused."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The models have no running statistics."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Nothing to remove; as the reference sets it."}
    )
    loss: str = field(
        default="contrastive", metadata={"help": "contrastive or siglip", "choices": ["contrastive", "siglip"]}
    )
    contrastive_scope: str = field(
        default="global",
        metadata={
            "help": "Negatives from all ranks, or from the rank's own batch (local: the published tables).",
            "choices": ["global", "local"],
        },
    )
    clamp_logit_scale: bool = field(default=True, metadata={"help": "Keep logit_scale at or below ln 100."})
    zero_shot_dir: str | None = field(default=None, metadata={"help": "Folder of class folders: zero-shot accuracy."})
    class_names: str | None = field(
        default=None, metadata={"help": "File with one class name a line, in folder order."}
    )
    templates: str | None = field(default=None, metadata={"help": "File of prompts with {}; default ImageNet's 80."})
    retrieval_picture: bool = field(default=True, metadata={"help": "Draw queries and their answers after evaluation."})
    skip_steps: int = field(default=10, metadata={"help": "First steps that do not count in FPS."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew; old results move to earlier/."})
    loss_scale: float | None = field(
        default=None, metadata={"help": "fp16: a constant scale of the loss up to 65536; a larger one begins there."}
    )
    device_name: str = field(default="auto", metadata={"help": "auto, npu, cuda or cpu (--device)."})
    precision: str | None = field(default=None, metadata={"help": "fp32, bf16 or fp16 (also --bf16, --fp16)."})
    profile: bool = field(default=False, metadata={"help": "Record steps 10 to 12: OUTPUT_DIR/profile."})
    case_kind: str = field(default="acc", metadata={"help": "acc or perf: the kind in the result file's name."})

    def __post_init__(self):
        if self.precision is not None:
            if self.precision not in PRECISIONS:
                raise UsageError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}")
            self.fp16, self.bf16 = self.precision == "fp16", self.precision == "bf16"
        self.precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"
        if self.max_steps == 0:
            self.max_steps = -1
        super().__post_init__()
        self._n_gpu = min(1, self._n_gpu)  # several cards are several processes, never DataParallel
        # The chunks of a large batch share one loss, so the Trainer must see one batch (trainer.py, _chunked_step).
        self.micro_batch_size = self.per_device_train_batch_size
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The command line; of one that only names a .json file, the options in that file as they would be typed.

    Raises:
        UsageError: the file is missing, or not an object of options.
    """
    if len(argv) != 1 or not argv[0].endswith(".json"):
        return list(argv)
    try:
        options = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{argv[0]}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{argv[0]}: not valid JSON ({error})") from None
    if not isinstance(options, dict):
        raise UsageError(f'{argv[0]}: must hold one object, {{"option": value, ...}}')
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return words


def device_of(argv: Sequence[str]) -> str:
    """The device asked for: it must be there before the rest can be parsed, since TrainingArguments looks at it."""
    given = [value for name, value in itertools.pairwise(argv) if name == "--device_name"]
    return given[-1] if given else "auto"


def parse(argv: Sequence[str], world: World) -> tuple[ModelArguments, DataArguments, ClipTrainingArguments]:
    """The three groups of options from a command line.

    Raises:
        UsageError: unknown option, wrong value, or options that do not go together.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, ClipTrainingArguments), allow_abbrev=False)
    try:
        groups = parser.parse_args_into_dataclasses([*argv, "--use_cpu", str(world.device.type == "cpu")])
    except ValueError as error:
        raise UsageError(f"options: {error}") from None
    _check(*groups)
    return groups


def _check(model: ModelArguments, data: DataArguments, training: ClipTrainingArguments) -> None:
    if not (training.do_train or training.do_eval):
        raise UsageError("nothing to do: give --do_train, --do_eval or both")
    if training.do_predict:
        raise UsageError(
            "--do_predict does not exist here (nor does it work in the reference): --do_eval reports retrieval"
        )
    if data.dataset_name and data.dataset_name.rsplit("/", 1)[-1] != "coco_dataset_script":
        raise UsageError(
            f"--dataset_name {data.dataset_name}: only ydshieh/coco_dataset_script is known by name; other pairs come "
            "as --train_file (.csv, .tsv, .jsonl) or --train_shards (tars)"
        )
    if data.dataset_config_name not in (None, "2017"):
        raise UsageError(f"--dataset_config_name {data.dataset_config_name}: only 2017 is known")
    for split, needed in (("train", training.do_train), ("validation", training.do_eval)):
        file, shards = getattr(data, f"{split}_file"), getattr(data, f"{split}_shards")
        if file and shards:
            raise UsageError(f"--{split}_file and --{split}_shards: give one of them")
        if needed and not (file or shards or data.data_dir):
            raise UsageError(f"no {split} pairs: give --data_dir (COCO), --{split}_file or --{split}_shards")
    for path in (data.train_file, data.validation_file, training.class_names, training.templates):
        if path and not os.path.isfile(path):
            raise UsageError(f"{path}: no such file")
    if training.zero_shot_dir and not os.path.isdir(training.zero_shot_dir):
        raise UsageError(f"--zero_shot_dir {training.zero_shot_dir}: no such folder")
    if training.zero_shot_dir and not training.do_eval:
        raise UsageError("--zero_shot_dir is for evaluation: add --do_eval")
    if (training.class_names or training.templates) and not training.zero_shot_dir:
        raise UsageError("--class_names and --templates describe the pictures of --zero_shot_dir: give that too")
    if training.label_smoothing_factor:
        raise UsageError(
            "--label_smoothing_factor: the targets are which caption belongs to which picture; leave it out"
        )
    if training.auto_find_batch_size:
        raise UsageError(
            "--auto_find_batch_size: another batch has other negatives; lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps, which keeps the large batch's loss"
        )
    if model.model_name_or_path and Path(model.model_name_or_path).is_file():
        raise UsageError(f"--model_name_or_path {model.model_name_or_path}: give the folder, not a file in it")
    if min(training.micro_batch_size, training.per_device_train_batch_size, training.per_device_eval_batch_size) < 1:
        raise UsageError("batch sizes and --gradient_accumulation_steps must be at least 1")
    if training.dataloader_num_workers < 0 or training.num_train_epochs <= 0:
        raise UsageError("--dataloader_num_workers must be at least 0, and --num_train_epochs above it")
    if Path(training.output_dir).exists() and not Path(training.output_dir).is_dir():
        raise UsageError(f"--output_dir {training.output_dir}: a file, not a folder")
    for name, least in (("max_train_samples", 1), ("max_eval_samples", 1), ("max_seq_length", 3)):
        value = getattr(data, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
