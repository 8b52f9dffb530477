"""Several processes that train one run together, a device each: who computes what, and where they meet."""
