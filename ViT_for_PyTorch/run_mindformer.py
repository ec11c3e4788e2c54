"""The door for MindFormers' command lines: run_vit.py under the name and with the habits of the reference.

    python run_mindformer.py --config ./configs/vit/run_vit_base_p16_224_100ep.yaml --run_mode train
    python run_mindformer.py --config ./configs/vit/run_vit_base_p16_224_100ep.yaml --run_mode eval
    python run_mindformer.py --config ./configs/vit/run_vit_base_p16_224_100ep.yaml --run_mode predict --predict_data X

Data folders are the configuration's (imageNet-1k/train and imageNet-1k/val below the current folder); evaluation and
prediction take the model's published weights where none are given. MindFormers' own YAML files are read, too.
"""

import common.requirements

import run_vit

if __name__ == "__main__":
    run_vit.main(published_weights=True, description=__doc__)
