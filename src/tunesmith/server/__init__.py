"""A tuned model behind OpenAI's routes. Nothing here imports torch: the model lives in a child process (inference/)."""
