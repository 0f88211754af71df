"""Continued self-supervised pretraining: objectives, monitoring and the dry run."""
