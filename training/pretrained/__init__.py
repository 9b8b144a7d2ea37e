"""Teachers from checkpoints on disk, and students as pipelines that stock diffusers runs."""
