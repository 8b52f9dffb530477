"""Fine-tuning jobs over HTTP, in OpenAI's shape: files, jobs, events, checkpoints, models. Imports no torch."""
