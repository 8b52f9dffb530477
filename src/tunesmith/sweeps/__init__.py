"""Many runs over a grid of options: each an ordinary run, the poor ones stopped early, one table at the end."""
