"""The `Trainer` of MindFormers' README: train, finetune, evaluate and predict by keyword, on run_vit.py's functions."""

from pathlib import Path
from typing import Any

from vit import engine, evaluation
from vit.api.predictor import Prediction, check_task, pipeline
from vit.config import run_config as configuration
from vit.config.run_config import Config
from vit.model.vision_transformer import PRESETS
from vit.training.checkpoint import find

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {"vit_base_p16": CONFIGS / "run_vit_base_p16_224_100ep.yaml", "vit_demo": CONFIGS / "run_vit_demo.yaml"}
Checkpoint = str | Path | bool | None  # a file or published name; True = the run's last; None or False = not given


class Trainer:
    """Image classification from keyword arguments.

    Args:
        task: "image_classification".
        model: a model name; it also chooses the recipe (`RECIPES`, else the defaults of vit/config/run_config.py).
        train_dataset, eval_dataset: image folders `<class>/<picture>`.
        args: a YAML file to use instead of the recipe.
        output_dir: results and checkpoints.
        overrides: any key of the configuration, e.g. `{"epochs": 20, "optimizer.base_lr": 1e-3}`.

    Raises:
        ValueError: another task, or an unknown model.
        UsageError: what the configuration refuses.
    """

    def __init__(
        self,
        task: str = "image_classification",
        model: str = "vit_base_p16",
        train_dataset: str | Path | None = None,
        eval_dataset: str | Path | None = None,
        args: str | Path | None = None,
        output_dir: str | Path = "output",
        overrides: dict[str, Any] | None = None,
    ):
        check_task(task)
        model = model.removeprefix("mindspore/")
        if model not in PRESETS:
            raise ValueError(f"unknown model {model!r}; known: {', '.join(PRESETS)}")
        self.model, self.recipe, self.output_dir = model, args or RECIPES.get(model), Path(output_dir)
        self.settings = {
            "model.name": model,
            "data.train_dataset_dir": str(train_dataset or ""),
            "data.eval_dataset_dir": str(eval_dataset or ""),
            "output_dir": str(output_dir),
            "do_eval": eval_dataset is not None,
            **(overrides or {}),
        }
        self.config()  # what is wrong is said now, not after an hour

    def config(self, **changes: Any) -> Config:
        """The configuration of a run, with top-level keys replaced."""
        return configuration.load(self.recipe, {**self.settings, **changes})

    def train(
        self,
        train_checkpoint: Checkpoint = None,
        resume_or_finetune_from_checkpoint: Checkpoint = None,
        resume_training: Checkpoint = None,
        do_finetune: bool = False,
        do_eval: bool | None = None,
    ) -> dict[str, Any]:
        """Trains and returns the keys of the result file.

        Args:
            train_checkpoint: weights to start from; with `resume_training=True`, the run to continue. None = scratch.
            resume_or_finetune_from_checkpoint: with `do_finetune`, weights to start from; without, the run to continue.
            resume_training: True = continue the run of `train_checkpoint`, or this output_dir's; a file = that one.
            do_eval: evaluate during training; None = when there is an eval_dataset.
        """
        weights, resume = train_checkpoint, resume_training
        if resume_or_finetune_from_checkpoint:
            if do_finetune:
                weights = resume_or_finetune_from_checkpoint
            else:
                resume = resume_or_finetune_from_checkpoint
        elif do_finetune and not weights:
            raise ValueError("do_finetune=True needs weights: resume_or_finetune_from_checkpoint='mae_vit_base_p16'")
        if resume is True and isinstance(weights, str | Path):
            weights, resume = None, weights
        if not self.settings["data.train_dataset_dir"]:
            raise ValueError("train() needs pictures: Trainer(..., train_dataset='imageNet-1k/train')")
        changes: dict[str, Any] = {} if do_eval is None else {"do_eval": do_eval}
        if resume:
            changes["resume_training"] = "auto" if resume is True else str(resume)
        if weights:
            changes["load_checkpoint"] = self._file(weights)
        return engine.train(self.config(**changes))

    def finetune(self, finetune_checkpoint: Checkpoint = "mae_vit_base_p16", do_eval: bool | None = None):
        """`train` from the weights of another model; a head with another number of classes is started anew."""
        return self.train(resume_or_finetune_from_checkpoint=finetune_checkpoint, do_finetune=True, do_eval=do_eval)

    def evaluate(self, eval_checkpoint: Checkpoint = None) -> dict[str, Any]:
        """Scores a checkpoint on eval_dataset: exact counts over every picture. None = the model's published weights.

        The result goes to output_dir/evaluation, beside the training run's.

        Raises:
            ValueError: the Trainer has no eval_dataset.
        """
        if not self.settings["data.eval_dataset_dir"]:
            raise ValueError("evaluate() needs pictures: Trainer(..., eval_dataset='imageNet-1k/val')")
        folder = str(self.output_dir / "evaluation")
        return evaluation.evaluate(
            self.config(load_checkpoint=self._file(eval_checkpoint or self.model), output_dir=folder)
        )

    def predict(
        self, predict_checkpoint: Checkpoint = None, input_data: Any = None, top_k: int | None = 1
    ) -> list[list[Prediction]]:
        """The best `top_k` labels of each picture (None = all). No checkpoint = the model's published weights."""
        if input_data is None:
            raise ValueError("predict needs input_data: a picture, a path or URL, or a list of these")
        config = self.config()
        classify = pipeline(
            model=self._file(predict_checkpoint or self.model),
            image_size=config.model.img_size,
            device=config.device,
            precision=config.precision,
        )
        return classify(input_data, top_k=top_k)

    def _file(self, checkpoint: Checkpoint) -> str:
        if checkpoint is not True:
            return str(checkpoint)
        last = find("auto", str(self.output_dir))
        if last is None:
            raise ValueError(f"there is no checkpoint in {self.output_dir} yet: train first, or name a file")
        return str(last)
