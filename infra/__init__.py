"""What surrounds the training step: models, engines, data, run folder, command line."""
