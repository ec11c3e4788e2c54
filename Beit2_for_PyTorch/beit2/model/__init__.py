"""The networks: masked image model, classifier, tokenizer and its teachers, as in the paper."""
