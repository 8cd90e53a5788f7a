"""The two errors a caller is meant to see: each message is one sentence that says what to do."""


class MedusaError(Exception):
    """Something outside the call is wrong (a file, a model, the machine). The command line exits with 1."""


class UsageError(MedusaError, ValueError):
    """An argument is wrong. The command line exits with 2."""
