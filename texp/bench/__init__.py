"""texp bench: how long a step takes, and how that is measured and shown."""
