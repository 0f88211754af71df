"""The choice of a model by inner cross-validation: `brainfound finetune auto`."""
