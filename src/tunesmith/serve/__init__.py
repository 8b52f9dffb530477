"""Many answers at once from one base and its adapters: the batch, its cache, and the
child process they live in."""
