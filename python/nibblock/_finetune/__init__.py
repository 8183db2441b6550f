"""`python -m nibblock finetune`: data, methods, the loop, checkpoints and the report."""
