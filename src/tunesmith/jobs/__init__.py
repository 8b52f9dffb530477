"""Fine-tuning jobs over HTTP, in OpenAI's shape: files, jobs, events, checkpoints and models. Imports no torch."""
